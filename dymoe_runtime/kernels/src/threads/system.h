// What the threads that read ask of the system, for POSIX and for Windows.
#pragma once

#include <cstdint>
#include <vector>

#include "threads/read_threads.h"

namespace dymoe {

/// Reads from a file at an offset with one system call: into all spans where the system can read into several, else
/// into the first. Returns the number of bytes read, 0 at the end of the file, or -1 with the reason in errno.
int64_t read_at(int fd, const std::vector<Span>& spans, int64_t offset);

/// Returns whether a file ends at `offset` or before; false if that is not known.
bool ends_before(int fd, int64_t offset);

/// Returns a number that a process shares with no other that lives at the same time.
int64_t process_id();

/// Names the calling thread for debuggers and `top`, where the system can.
void name_thread(const char* name);

}  // namespace dymoe
