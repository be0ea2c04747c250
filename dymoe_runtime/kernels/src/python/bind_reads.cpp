// Python bindings of threads that read.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <functional>
#include <memory>

#include "python/arguments.h"
#include "python/bind.h"
#include "threads/read_threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dymoe {
namespace {

/// Returns a Python function in a form that a thread without the GIL can call and destroy.
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

void make_reads(ReadThreads* reads, int threads) {
  if (threads < 1) reject("threads: expected at least one");
  new (reads) ReadThreads(threads);
}

uint64_t submit_read(ReadThreads& reads, int fd, int64_t offset, const SegmentTuples& tuples, int urgency,
                     nb::object then, std::vector<uint32_t> checksums) {
  check_urgency(urgency);
  std::vector<Span> spans;
  for (const auto& [address, nbytes] : tuples) {
    if (nbytes < 0) reject("places: expected no fewer than 0 bytes");
    spans.push_back({reinterpret_cast<uint8_t*>(address), nbytes});
  }
  if (!checksums.empty() && checksums.size() != spans.size()) reject("checksums: expected one for each place");
  return reads.submit(fd, offset, std::move(spans), urgency, callback(std::move(then)), std::move(checksums));
}

bool reprioritize_read(ReadThreads& reads, uint64_t ticket, int now, int urgency) {
  check_urgency(now), check_urgency(urgency);
  return reads.reprioritize(ticket, now, urgency);
}

bool cancel_read(ReadThreads& reads, uint64_t ticket, int urgency) {
  check_urgency(urgency);
  return reads.cancel(ticket, urgency);
}

std::vector<std::tuple<uint64_t, int, int64_t, double>> finished_reads(ReadThreads& reads) {
  std::vector<std::tuple<uint64_t, int, int64_t, double>> tuples;
  for (const Outcome& o : reads.finished()) tuples.emplace_back(o.ticket, o.error, o.done, o.seconds);
  return tuples;
}

void wait_for_read(ReadThreads& reads, uint64_t ticket) {
  try {
    nb::gil_scoped_release unlocked;
    wait_for(reads, ticket, signal_pending);
  } catch (const Interrupted&) {
    throw nb::python_error();
  }
}

bool close_reads(ReadThreads& reads, double patience_s) {
  try {
    nb::gil_scoped_release unlocked;
    return close(reads, patience_s, signal_pending);
  } catch (const Interrupted&) {
    throw nb::python_error();
  }
}

}  // namespace

void bind_reads(nb::module_& m) {
  nb::class_<ReadThreads>(m, "ReadThreads")
      .def("__init__", &make_reads, "threads"_a)
      .def("submit", &submit_read, "fd"_a, "offset"_a, "places"_a, "urgency"_a, "then"_a.none(),
           "checksums"_a = std::vector<uint32_t>())
      .def("reprioritize", &reprioritize_read, "ticket"_a, "now"_a, "urgency"_a)
      .def("cancel", &cancel_read, "ticket"_a, "urgency"_a)
      .def("started", &ReadThreads::started)
      .def("finished", &finished_reads)
      .def("pending", &ReadThreads::pending)
      .def("wait", &wait_for_read, "ticket"_a)
      .def("close", &close_reads, "patience_s"_a);
}

}  // namespace dymoe
