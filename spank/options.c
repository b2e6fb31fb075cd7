#include "options.h"

#include <stdarg.h>
#include <stdio.h>
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

bool is_auto(const char *text)
{
	return text && !strcmp(text, "auto");
}

/* Take one "gpu:size" of `length` characters. Returns NULL, or what is wrong. */
static const char *take_gpu_size(const char *entry, size_t length, struct mem_option *option)
{
	char size[OPTION_MAX];
	unsigned long gpu;
	const char *colon = read_digits(entry, 2, &gpu);
	size_t size_length;
	uint64_t mib;

	if (!colon || *colon != ':' || gpu >= GPUS_MAX)
		return "expected " MEM_EXPECTED;
	size_length = length - (size_t)(colon + 1 - entry);
	if (size_length >= sizeof(size))
		return "expected " MEM_EXPECTED;
	memcpy(size, colon + 1, size_length);
	size[size_length] = '\0';
	mib = mem_mib(size);
	if (!mib)
		return "expected " MEM_EXPECTED;
	if (option->mib[gpu])
		return "it names a GPU twice";
	option->mib[gpu] = mib;
	return NULL;
}

const char *mem_option(const char *text, struct mem_option *option)
{
	const char *problem = NULL;
	uint64_t each;

	memset(option, 0, sizeof(*option));
	if (!text || !*text)
		return NULL;
	option->automatic = is_auto(text);
	option->by_gpu = strchr(text, ':') != NULL;
	if (option->automatic)
		return NULL;
	if (!option->by_gpu) {
		each = mem_mib(text);
		for (unsigned int gpu = 0; gpu < GPUS_MAX; gpu++)
			option->mib[gpu] = each;
		return each ? NULL : "expected " MEM_EXPECTED;
	}
	while (!problem) {
		size_t length = strcspn(text, ",");

		problem = take_gpu_size(text, length, option);
		text += length;
		if (!*text++)
			break;
	}
	return problem;
}

bool daemons_option(const char *text, enum daemons *daemons)
{
	*daemons = DAEMONS_UNSAID;
	if (!text || !*text || !strcmp(text, "(null)"))
		return true;
	if (!strcmp(text, "per-node"))
		*daemons = DAEMONS_PER_NODE;
	else if (!strcmp(text, "per-gpu"))
		*daemons = DAEMONS_PER_GPU;
	return *daemons != DAEMONS_UNSAID;
}

int client_priority(const char *text)
{
	if (text && !strcmp(text, "normal"))
		return 0;
	return text && !strcmp(text, "low") ? 1 : -1;
}

bool refuse_with(char *message, size_t size, const char *format, ...)
{
	va_list values;

	va_start(values, format);
	(void)vsnprintf(message, size, format, values);
	va_end(values);
	return false;
}

void printable(char *out, size_t size, const char *text)
{
	size_t i;

	for (i = 0; i + 1 < size && text[i]; i++)
		out[i] = text[i] >= ' ' && text[i] <= '~' ? text[i] : '?';
	out[i] = '\0';
}
