-- Job submit plugin (JobSubmitPlugins=lua): refuses a request that no prolog could be given.
--
-- Any user can send SPANK_* variables of any length. slurmd puts them into the environment of every Prolog and Epilog,
-- whatever these do; where one of them is over 128 KiB, or all together over a quarter of the stack limit, execve(2)
-- fails, and Slurm takes that for a prolog that failed: it drains the node and gives the job another one.

local LONGEST, TOTAL = 4096, 65536

local function too_much(job_desc)
	local total = 0
	for _, variable in pairs(job_desc.spank_job_env or {}) do
		total = total + #variable
		if #variable > LONGEST or total > TOTAL then
			return true
		end
	end
	return false
end

function slurm_job_submit(job_desc, part_list, submit_uid)
	if too_much(job_desc) then
		slurm.log_user("the variables that plugins send along with this job are too long")
		return slurm.ERROR
	end
	return slurm.SUCCESS
end

function slurm_job_modify(job_desc, job_rec, part_list, modify_uid)
	return slurm_job_submit(job_desc, part_list, modify_uid)
end
