// The parts of the Python module that are bound in files of their own.
#pragma once

#include <nanobind/nanobind.h>

namespace dymoe {

/// Binds ReadThreads, which read without the GIL.
void bind_reads(nanobind::module_& m);

/// Binds what runs a decoded token: DecodeLayer, ResidentTable, DecodeStack and moe_token.
void bind_decode(nanobind::module_& m);

/// Takes the GIL, runs Python's signal handlers, and returns whether one raised an exception.
inline bool signal_pending() {
  nanobind::gil_scoped_acquire locked;
  return PyErr_CheckSignals() != 0;
}

}  // namespace dymoe
