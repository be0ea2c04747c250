#include "record/plan.h"

#include <algorithm>
#include <stdexcept>

namespace dymoe {
namespace {

constexpr int64_t kMaxOffset = int64_t(1) << 60;  // keeps the end of a part from overflowing

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}

int64_t blocks_of(const MatrixLayout& m) { return (m.cols + kBlock - 1) / kBlock; }

void check_part(const MatrixLayout& m, const Part& part, int64_t nbytes) {
  require(part.segment >= 0 && part.offset >= 0 && part.offset < kMaxOffset && part.nbytes == nbytes,
          "matrix '" + m.name + "': a part of its layout does not fit its shape");
}

/// Returns the bytes of a plane of `width` bits; on the trellis grid a plane of one bit has a symbol for two rows.
int64_t plane_bytes(const MatrixLayout& m, int width) {
  if (m.grid != Grid::trellis) return m.rows * blocks_of(m) * 8 * width;
  return (width == 2 ? m.rows : (m.rows + 1) / 2) * symbol_bytes(blocks_of(m));
}

void check_planes(const MatrixLayout& m) {
  int bits = 0;
  size_t rung = 0;
  for (const Plane& plane : m.planes) {
    const int w = plane.width;
    require(w == 1 || w == 2 || w == 4 || w == 8, "matrix '" + m.name + "': planes are 1, 2, 4 or 8 bits wide");
    check_part(m, plane.part, plane_bytes(m, w));
    bits += w;
    require(rung < m.ladder.size() && plane.tier == m.ladder[rung] && bits <= plane.tier,
            "matrix '" + m.name + "': its planes do not follow its tiers");
    if (bits == plane.tier) ++rung;
  }
  require(rung == m.ladder.size() && rung > 0 && bits <= 8,
          "matrix '" + m.name + "': its planes do not reach its tiers");
}

void check_matrix(const MatrixLayout& m) {
  require(m.rows > 0 && m.cols > 0 && m.rows < (int64_t(1) << 31) && m.cols < (int64_t(1) << 31),
          "matrix '" + m.name + "': its shape is out of range");
  require(!m.ladder.empty() && m.ladder.front() >= 2, "matrix '" + m.name + "': its tiers are below 2 bits");
  check_planes(m);
  require(m.grid != Grid::mxfp4 || m.ladder.back() <= kMaxCurved,
          "matrix '" + m.name + "': weights in MXFP4 have " + std::to_string(kMaxCurved) + " bits at most");
  if (m.grid == Grid::trellis) {
    require(m.ladder.back() <= kMaxTrellis,
            "matrix '" + m.name + "': trellis codes have " + std::to_string(kMaxTrellis) + " bits at most");
    for (size_t i = 0; i < m.planes.size(); ++i)
      require(m.planes[i].width == (i == 0 ? 2 : 1),
              "matrix '" + m.name + "': trellis codes have planes of 2, 1, 1 bits");
  }
  require(m.scale_indices.size() == m.ladder.size(),
          "matrix '" + m.name + "': it needs one part of scale indices for each tier");
  for (const Part& part : m.scale_indices) check_part(m, part, m.rows * scale_index_bytes(blocks_of(m), m.grid));
  check_part(m, m.multiplier, 2 * m.rows);
}

void check_vector(const VectorLayout& v) {
  require(v.part.segment >= 0 && v.part.offset >= 0 && v.part.offset < kMaxOffset && v.part.nbytes >= 0 &&
              v.part.nbytes < kMaxOffset && v.part.nbytes % int64_t(sizeof(float)) == 0,
          "vector '" + v.name + "': its part does not fit");
}

/// Returns the bytes of a part; `who` needs them.
const uint8_t* locate(const std::string& who, const Part& part, const std::vector<Segment>& segments) {
  const int64_t end = part.offset + part.nbytes, count = int64_t(segments.size());
  if (part.segment < count && end <= segments[part.segment].nbytes) return segments[part.segment].data + part.offset;
  const std::string segment = "segment " + std::to_string(part.segment);
  if (part.segment >= count)
    throw std::invalid_argument(who + " needs " + segment + ", got " + std::to_string(count) + " segments");
  throw std::invalid_argument(who + " needs " + std::to_string(end) + " bytes of " + segment + ", got " +
                              std::to_string(segments[part.segment].nbytes));
}

size_t rung_of(const MatrixLayout& m, int tier) {
  const auto found = std::find(m.ladder.begin(), m.ladder.end(), tier);
  if (found != m.ladder.end()) return found - m.ladder.begin();
  std::string tiers;
  for (int t : m.ladder) tiers += (tiers.empty() ? "" : ", ") + std::to_string(t);
  throw std::invalid_argument("tier " + std::to_string(tier) + " of '" + m.name + "': its tiers are " + tiers);
}

}  // namespace

Plan::Plan(std::vector<MatrixLayout> matrices, std::vector<VectorLayout> vectors)
    : matrices_(std::move(matrices)), vectors_(std::move(vectors)) {
  for (const MatrixLayout& m : matrices_) check_matrix(m);
  for (const VectorLayout& v : vectors_) check_vector(v);
}

const MatrixLayout& Plan::matrix(const std::string& name) const {
  for (const MatrixLayout& m : matrices_)
    if (m.name == name) return m;
  throw std::invalid_argument("this record has no matrix '" + name + "'");
}

MatrixView Plan::view(const std::string& name, int tier, const std::vector<Segment>& segments) const {
  const MatrixLayout& m = matrix(name);
  const auto find = [&](const Part& part) {
    return locate("tier " + std::to_string(tier) + " of '" + m.name + "'", part, segments);
  };
  MatrixView view{};
  view.rows = m.rows, view.cols = m.cols, view.blocks = blocks_of(m), view.bits = tier, view.grid = m.grid;
  view.scale_indices = find(m.scale_indices[rung_of(m, tier)]);
  view.multiplier = find(m.multiplier);
  view.levels = levels_of(tier, m.ladder.back(), m.grid);
  for (const Plane& plane : m.planes)
    if (plane.tier <= tier) view.plane[view.planes++] = {plane.width, find(plane.part)};
  return view;
}

VectorView Plan::vector(const std::string& name, const std::vector<Segment>& segments) const {
  for (const VectorLayout& v : vectors_) {
    if (v.name != name) continue;
    const uint8_t* found = locate("'" + name + "'", v.part, segments);
    require(reinterpret_cast<uintptr_t>(found) % alignof(float) == 0, "'" + name + "' is not aligned");
    return {static_cast<const float*>(static_cast<const void*>(found)), v.part.nbytes / int64_t(sizeof(float))};
  }
  return {nullptr, 0};
}

}  // namespace dymoe
