/* Lines of control.log and server.log, in the driver's form. */
#ifndef MPS_LOG_H
#define MPS_LOG_H

#include <stddef.h>

/* "[2026-11-23 01:21:13.684 Control   480] text\n" to fd in one write; fd -1, or a failing one, is passed over. */
void mps_log(int fd, const char *who, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
