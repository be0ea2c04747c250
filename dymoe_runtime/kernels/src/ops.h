// Whole operations on records, in parallel over rows.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace dymoe {

/// y = x . weight^T; x [tokens, cols], y [tokens, rows].
void linear(const Kernels& isa, const MatrixView& weight, const float* x, int64_t tokens, float* y);

/// y = x . weight^T for a weight [rows, cols] of floats or, if `narrow`, bf16; x [tokens, cols], y [tokens, rows].
/// The value of an element does not depend on the others.
void matmul(const Kernels& isa, const void* weight, bool narrow, int64_t rows, int64_t cols, const float* x,
            int64_t tokens, float* y);

/// hidden = act(hidden) * ups, count floats each.
void activate(const Kernels& isa, Activation activation, int64_t count, const float* ups, float* hidden);

/// out[t] = weight * x[t] / rms(x[t]); x and out [tokens, n]; out may be x.
void norms(const Kernels& isa, const float* x, const float* weight, int64_t tokens, int64_t n, float eps, float* out);

/// Turns pairs of columns i and i + n / 2 of every head, x [tokens, heads, n], by the cosines and sines of its
/// token, [tokens, n].
void rotate(float* x, int64_t tokens, int64_t heads, int64_t n, const float* cosines, const float* sines);

/// Improves the scales and codes of a block of columns.
void descend(const Kernels& isa, const Descent& block);

/// The codes and scales that the descent of a matrix starts from.
void fit(const Kernels& isa, const Fit& fit);

/// out[i] = row ids[i] of weight; ids below weight.rows, or null for all rows in order.
void rows(const Kernels& isa, const MatrixView& weight, const int64_t* ids, int64_t count, float* out);

/// Reads all bytes, as fast as memory allows; the sum of their words.
uint64_t read_memory(const uint8_t* data, int64_t nbytes);

}  // namespace dymoe
