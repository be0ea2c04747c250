// The parts of the module that have files of their own.
#pragma once

#include <nanobind/nanobind.h>

namespace dymoe {

constexpr double kLook = 0.05;  // seconds after which signals are looked for: a disk may never answer

/// Reads, by threads without the GIL.
void bind_reads(nanobind::module_& m);

/// What a decoded token goes through: layers, and the experts of one.
void bind_decode(nanobind::module_& m);

}  // namespace dymoe
