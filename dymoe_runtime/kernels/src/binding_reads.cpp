// Reads and their ends, for Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <functional>
#include <memory>

#include "arguments.h"
#include "binding.h"
#include "reads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dymoe {
namespace {

/// A function of Python's as a thread calls it that has no GIL.
std::function<void()> callback(nb::object function) {
  if (function.is_none()) return {};
  std::shared_ptr<nb::object> held(new nb::object(std::move(function)), [](nb::object* last) {
    nb::gil_scoped_acquire locked;
    delete last;
  });
  return [held] {
    nb::gil_scoped_acquire locked;
    try {
      (*held)();
    } catch (nb::python_error& error) {
      error.discard_as_unraisable("the end of a read");
    }
  };
}

void check_urgency(int urgency) {
  if (urgency < 0 || urgency >= kUrgencies) reject("urgency: expected 0.." + std::to_string(kUrgencies - 1));
}

void make_reads(Reads* reads, int threads) {
  if (threads < 1) reject("threads: expected at least one");
  new (reads) Reads(threads);
}

uint64_t submit_read(Reads& reads, int fd, int64_t offset, const SegmentTuples& tuples, int urgency, nb::object then) {
  check_urgency(urgency);
  std::vector<Span> spans;
  for (const auto& [address, nbytes] : tuples) {
    if (nbytes < 0) reject("places: expected no fewer than 0 bytes");
    spans.push_back({reinterpret_cast<uint8_t*>(address), nbytes});
  }
  return reads.submit(fd, offset, std::move(spans), urgency, callback(std::move(then)));
}

bool hurry_read(Reads& reads, uint64_t ticket, int now, int urgency) {
  check_urgency(now), check_urgency(urgency);
  return reads.hurry(ticket, now, urgency);
}

bool cancel_read(Reads& reads, uint64_t ticket, int urgency) {
  check_urgency(urgency);
  return reads.cancel(ticket, urgency);
}

std::vector<std::tuple<uint64_t, int, int64_t, double>> finished_reads(Reads& reads) {
  std::vector<std::tuple<uint64_t, int, int64_t, double>> tuples;
  for (const Outcome& o : reads.finished()) tuples.emplace_back(o.ticket, o.error, o.done, o.seconds);
  return tuples;
}

void wait_for_read(Reads& reads, uint64_t ticket) {
  while (true) {
    {
      nb::gil_scoped_release unlocked;
      if (reads.wait(ticket, kLook)) return;
    }
    if (PyErr_CheckSignals()) throw nb::python_error();
  }
}

bool close_reads(Reads& reads, double patience_s) {
  bool ended = false, interrupted = false;
  do {
    {
      nb::gil_scoped_release unlocked;
      ended = reads.stop(std::min(patience_s, kLook));
    }
    interrupted = PyErr_CheckSignals();
    patience_s -= kLook;
  } while (!ended && !interrupted && patience_s > 0);
  reads.abandon();
  if (interrupted) throw nb::python_error();
  return ended;
}

}  // namespace

void bind_reads(nb::module_& m) {
  nb::class_<Reads>(m, "Reads")
      .def("__init__", &make_reads, "threads"_a)
      .def("submit", &submit_read, "fd"_a, "offset"_a, "places"_a, "urgency"_a, "then"_a.none())
      .def("hurry", &hurry_read, "ticket"_a, "now"_a, "urgency"_a)
      .def("cancel", &cancel_read, "ticket"_a, "urgency"_a)
      .def("started", &Reads::started)
      .def("finished", &finished_reads)
      .def("pending", &Reads::pending)
      .def("wait", &wait_for_read, "ticket"_a)
      .def("close", &close_reads, "patience_s"_a);
}

}  // namespace dymoe
