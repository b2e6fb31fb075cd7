#include "options.h"

#include <stdbool.h>
#include <string.h>

/* isdigit() depends on the locale of whoever loaded us; these do not. */
static bool is_digit(char c)
{
	return c >= '0' && c <= '9';
}

/* Read up to `max_digits` digits; returns the first character after them, NULL when there are none or too many. */
static const char *read_digits(const char *text, int max_digits, unsigned long *value)
{
	int digits = 0;

	*value = 0;
	while (is_digit(*text)) {
		if (++digits > max_digits)
			return NULL;
		*value = *value * 10 + (unsigned long)(*text++ - '0');
	}
	return digits ? text : NULL;
}

unsigned int threads_tenths(const char *text)
{
	unsigned long tenths;
	const char *rest = text ? read_digits(text, 3, &tenths) : NULL;

	if (!rest)
		return 0;
	tenths *= 10;
	if (rest[0] == '.') {
		if (!is_digit(rest[1]))
			return 0;
		tenths += (unsigned long)(rest[1] - '0');
		rest += 2;
	}
	if (*rest || tenths > 1000)
		return 0;
	return (unsigned int)tenths;
}

uint64_t mem_mib(const char *text)
{
	unsigned long number;
	const char *rest = text ? read_digits(text, 9, &number) : NULL;

	if (!rest || !rest[0] || rest[1])
		return 0;
	switch (rest[0]) {
	case 'M':
	case 'm':
		return number;
	case 'G':
	case 'g':
		return (uint64_t)number << 10;
	case 'T':
	case 't':
		return (uint64_t)number << 20;
	default:
		return 0;
	}
}

int client_priority(const char *text)
{
	if (text && !strcmp(text, "normal"))
		return 0;
	return text && !strcmp(text, "low") ? 1 : -1;
}

void printable(char *out, size_t size, const char *text)
{
	size_t i;

	for (i = 0; i + 1 < size && text[i]; i++)
		out[i] = text[i] >= ' ' && text[i] <= '~' ? text[i] : '?';
	out[i] = '\0';
}
