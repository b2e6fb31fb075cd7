-- Job submit plugin (JobSubmitPlugins=lua): refuses a request that no prolog could be given, and marks jobs with MPS.
--
-- Any user can send SPANK_* variables of any length. slurmd puts them into the environment of every Prolog and Epilog,
-- whatever these do; where one of them is over 128 KiB, or all together over a quarter of the stack limit, execve(2)
-- fails, and Slurm takes that for a prolog that failed: it drains the node and gives the job another one.
--
-- Slurm shows these variables to nobody, so that no command could say which jobs asked for MPS. The admin comment of
-- such a job begins with "mps", as `slurm-mps status --cluster` reads it: mps:threads=25,mem=8G
-- Where another tool rewrites AdminComment when a job ends, let MARKED name "extra" or "comment", too.

local MARKED = { "admin_comment" }
local LONGEST, TOTAL = 4096, 65536
local SHOWN = { { "MPS_THREADS", "threads" }, { "MPS_MEM", "mem" }, { "MPS_PRIORITY", "priority" } }

local function too_much(variables)
	local total = 0
	for _, variable in pairs(variables) do
		total = total + #variable
		if #variable > LONGEST or total > TOTAL then
			return true
		end
	end
	return false
end

-- The request as the job sent it, which is its user's text: what the plugin would not take is left out.
local function request(variables)
	local asked, words = {}, {}
	for _, variable in pairs(variables) do
		-- Slurm puts the SPANK_ in front of those that have none later on.
		local name, value = variable:gsub("^SPANK_", ""):match("^(MPS[%u_]*)=([%w.:,-]*)$")
		if name and #value <= 64 then
			asked[name] = value
		end
	end
	if not next(asked) then
		return nil
	end
	if asked.MPS == "per-gpu" then
		words[1] = "per-gpu"
	end
	for _, shown in ipairs(SHOWN) do
		local value = asked[shown[1]]
		if value then
			words[#words + 1] = shown[2] .. "=" .. value:gsub(",", "+")
		end
	end
	return #words > 0 and "mps:" .. table.concat(words, ",") or "mps"
end

local function mark(job_desc, variables)
	local mps = request(variables)
	for _, field in ipairs(mps and MARKED or {}) do
		local text = job_desc[field]
		job_desc[field] = text and text ~= "" and mps .. ";" .. text or mps
	end
end

function slurm_job_submit(job_desc, part_list, submit_uid)
	local variables = job_desc.spank_job_env or {}
	if too_much(variables) then
		slurm.log_user("the variables that plugins send along with this job are too long")
		return slurm.ERROR
	end
	mark(job_desc, variables)
	return slurm.SUCCESS
end

function slurm_job_modify(job_desc, job_rec, part_list, modify_uid)
	if too_much(job_desc.spank_job_env or {}) then
		slurm.log_user("the variables that plugins send along with this job are too long")
		return slurm.ERROR
	end
	return slurm.SUCCESS
end
