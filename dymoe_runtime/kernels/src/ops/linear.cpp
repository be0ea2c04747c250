#include "ops/linear.h"

#include <vector>

#include "ops/workspace.h"

namespace dymoe {

void multiply(const Kernels& isa, const Activations& tokens, const Linear* const* weights, int64_t count, float* y) {
  struct Item {
    const Linear* linear;
    int64_t begin, end;
    float* y;
  };
  std::vector<Item> items;
  int64_t work = 0, stride = 0;
  for (int64_t w = 0; w < count; ++w) stride += weights[w]->weight.rows;
  for (int64_t w = 0; w < count; ++w) {
    const MatrixView& m = weights[w]->weight;
    const int64_t chunk = round_up(std::max<int64_t>(1, m.rows / (threads() * kChunksPerThread)), kRowMultiple);
    for (int64_t begin = 0; begin < m.rows; begin += chunk)
      items.push_back({weights[w], begin, std::min(m.rows, begin + chunk), y});
    y += m.rows;
    work += tokens.tokens * m.rows * m.blocks;
  }
  auto body = [&](int64_t i) {
    const Item& item = items[i];
    const MatrixView& m = item.linear->weight;
    isa.product(m, tokens, item.begin, item.end, item.y, stride, scratch_for(m));
    if (const float* bias = item.linear->bias)
      for (int64_t t = 0; t < tokens.tokens; ++t)
        for (int64_t r = item.begin; r < item.end; ++r) item.y[t * stride + r] += bias[r];
  };
  if (work < kSmallWork) {
    for (size_t i = 0; i < items.size(); ++i) body(int64_t(i));
  } else {
    parallel_for(int64_t(items.size()), body);
  }
}

}  // namespace dymoe
