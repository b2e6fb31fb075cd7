#include "mps_log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

void mps_log(int fd, const char *who, const char *format, ...)
{
	char line[2048], day[32];
	struct timeval now;
	struct tm local;
	va_list values;
	if (fd < 0)
		return;
	gettimeofday(&now, NULL);
	localtime_r(&now.tv_sec, &local);
	strftime(day, sizeof day, "%Y-%m-%d %H:%M:%S", &local);
	int at = snprintf(line, sizeof line, "[%s.%03d %s %5d] ", day, (int)(now.tv_usec / 1000), who, (int)getpid());
	va_start(values, format);
	vsnprintf(line + at, sizeof line - (size_t)at - 1, format, values);
	va_end(values);
	size_t length = strlen(line);
	line[length++] = '\n';
	/* A full disk, or a daemon that is gone, stops nobody. */
	if (write(fd, line, length) < 0)
		return;
}
