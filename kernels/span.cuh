// Where sequences lie among the rows of a pass.
#pragma once

#include "common.cuh"

// Sequences of a pack as the backend names them: rows first..end of each; `prefix` precedes `keys`.
struct Span {
    int queries_start, queries_end, keys_start, keys_end, prefix_start, prefix_end;
};
