/* What the fuzz targets of the plugin share: promises, and the parts of an input. */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "gpus.h"
#include "limits.h"
#include "verdict.h"

#define CHECK(truth) ((truth) ? (void)0 : broken(#truth))
#define IS_TEXT(field) (memchr((field), 0, sizeof(field)) != NULL)
#define IS_WORD(field) (IS_TEXT(field) && (field)[0] && !strchr((field), ' '))

_Noreturn void broken(const char *promise);

/*
 * An input is parts with a NUL between them; those that are missing are empty, and what is left over is the last part's.
 * Each is an allocation of its very size, so that one byte read past it is seen. Returns: the length of the last.
 */
size_t split(const uint8_t *data, size_t size, char *parts[], int count);
void free_parts(char *parts[], int count);

/* The targets: what the plugin parses, what it does for a step, and a file in a verdict's place. */
void fuzz_parsers(const uint8_t *data, size_t size);
void fuzz_step(const uint8_t *data, size_t size);
void fuzz_file(const uint8_t *data, size_t size);

/* What parsers.c lends the others: it has verdict.c's own functions, and the promises about a value. */
bool parsers_parse(struct verdict *verdict, char *text);
void parsers_read(const char *path, struct verdict *verdict);
void check_verdict(const struct verdict *verdict);
void check_limits(const struct verdict *verdict, const struct limits *limits);
void check_memory_value(const char *value, const struct verdict *verdict, const struct limits *limits,
			const struct task_gpus *task);
struct step_options kept_options(char *const four[]);

#endif
