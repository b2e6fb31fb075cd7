/* libFuzzer on the target that FUZZ names: parsers, step or file. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

_Noreturn void broken(const char *promise)
{
	fprintf(stderr, "broken promise: %s\n", promise);
	abort();
}

size_t split(const uint8_t *data, size_t size, char *parts[], int count)
{
	size_t length = 0;

	for (int i = 0; i < count; i++) {
		const uint8_t *end = size && i < count - 1 ? memchr(data, 0, size) : NULL;

		length = end ? (size_t)(end - data) : size;

		parts[i] = malloc(length + 1);
		if (!parts[i])
			abort();
		if (length)
			memcpy(parts[i], data, length);
		parts[i][length] = '\0';
		data += length + (end ? 1 : 0);
		size -= length + (end ? 1 : 0);
	}
	return length;
}

void free_parts(char *parts[], int count)
{
	for (int i = 0; i < count; i++)
		free(parts[i]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const struct {
		const char *name;
		void (*run)(const uint8_t *data, size_t size);
	} targets[] = { { "parsers", fuzz_parsers }, { "step", fuzz_step }, { "file", fuzz_file } };
	const char *chosen = getenv("FUZZ");

	for (size_t i = 0; i < sizeof(targets) / sizeof(targets[0]); i++)
		if (!chosen || !strcmp(chosen, targets[i].name)) {
			targets[i].run(data, size);
			return 0;
		}
	abort();
}
