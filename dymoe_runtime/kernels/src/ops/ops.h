// Whole operations on matrices and activations, in parallel over rows.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace dymoe {

/// Computes y = x . weight^T; x [tokens, cols], y [tokens, rows].
void linear(const Kernels& isa, const MatrixView& weight, const float* x, int64_t tokens, float* y);

/// Computes y = x . weight^T for a weight [rows, cols] of floats, or of bf16 if `is_bf16`. x is [tokens, cols], y is
/// [tokens, rows]. The value of an element does not depend on the number of tokens or rows.
void matmul(const Kernels& isa, const void* weight, bool is_bf16, int64_t rows, int64_t cols, const float* x,
            int64_t tokens, float* y);

/// Computes hidden = act(hidden) * ups, or what clamped_swiglu is, count floats each.
void activate(const Kernels& isa, Activation activation, int64_t count, const float* ups, float* hidden);

/// Computes out[t] = weight * x[t] / sqrt(mean(x[t]^2) + eps); x and out [tokens, n], weight [n]; out may be x.
void norms(const Kernels& isa, const float* x, const float* weight, int64_t tokens, int64_t n, float eps, float* out);

/// Computes out[t] = weight * (x[t] - mean(x[t])) / sqrt(variance(x[t]) + eps) + bias, as `norms` does; bias [n] may be
/// null.
void layer_norms(const Kernels& isa, const float* x, const float* weight, const float* bias, int64_t tokens, int64_t n,
                 float eps, float* out);

/// Rotates columns i and i + turning / 2 of every head of x [tokens, heads, n] in place; the columns from `turning` on
/// stay as they are. cosines and sines are [tokens, turning], one row for the position of each token.
void rotate(float* x, int64_t tokens, int64_t heads, int64_t n, int64_t turning, const float* cosines,
            const float* sines);

/// Improves the scales and codes of a block of columns, and updates the error.
void descend(const Kernels& isa, const Descent& block);

/// Chooses the codes and scales that the descent of a matrix starts from.
void fit(const Kernels& isa, const Fit& fit);

/// Computes out[i] = row ids[i] of weight as floats, [count, cols]. ids are below weight.rows; null stands for all
/// rows.
void rows(const Kernels& isa, const MatrixView& weight, const int64_t* ids, int64_t count, float* out);

/// Reads nbytes of memory as fast as possible and returns the sum of its 64-bit words. Up to 127 bytes at the end are
/// left out.
uint64_t read_memory(const uint8_t* data, int64_t nbytes);

}  // namespace dymoe
