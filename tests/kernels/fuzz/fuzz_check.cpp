// Runs seeded random inputs through what takes bytes and sizes from outside: fuzz_check FIRST COUNT. With clang's
// -fsanitize=fuzzer, which defines the macro below by hand, libFuzzer chooses the inputs instead.
#include <cstdlib>

#include "records.h"

#if defined(DYMOE_LIBFUZZER)
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  dymoe::fuzz(data, size);
  return 0;
}
#else
int main(int count, char** arguments) {
  const long first = count > 1 ? std::atol(arguments[1]) : 0, inputs = count > 2 ? std::atol(arguments[2]) : 1000;
  for (long seed = first; seed < first + inputs; ++seed) {
    dymoe::random_bits.seed(unsigned(seed));
    const std::vector<uint8_t> input = dymoe::random_bytes(dymoe::random_bits() % 400);
    dymoe::fuzz(input.data(), input.size());
  }
  std::printf("%ld inputs\n", inputs);
}
#endif
