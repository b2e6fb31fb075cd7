/* What only the simulator's libcuda.so.1 has: ways for a client to misbehave on purpose. For tests. */
#ifndef SIM_FAULT_H
#define SIM_FAULT_H

enum sim_fault_kind { SIM_FAULT_ILLEGAL_ADDRESS = 0, SIM_FAULT_TRAP = 1 };

/* A kernel of the current context fails: 700 or 719, for it and for every other client on its GPU (O30). Returns it. */
int simFault(int kind);
/* An endless kernel: returns when something ends it, with the error that did (O35). Without MPS: never. */
int simSpin(void);
/* The MPS server's pid, 0 when this process runs without MPS, -1 before cuInit. */
int simServerPid(void);

#endif
