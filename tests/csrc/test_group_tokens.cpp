// Grouping, the kernels of csrc/ in emulation, against loops that anybody can read.
#include <algorithm>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "emulation_hooks.h"
#include "group_tokens.cu"
#include "testing.h"

namespace {

using mbk::Integers;
using mbk::IntType;

std::mt19937_64 random_numbers(20240);

int64_t draw(int64_t low, int64_t high) { return high < low ? low : std::uniform_int_distribution<int64_t>(low, high)(random_numbers); }

int bytes_of(IntType type) {
  const int bytes[] = {1, 1, 2, 4, 8};
  return bytes[static_cast<int>(type)];
}

// (layers, size) integers of a type, at every `stride`-th place, the first one `shift` bytes behind a multiple of 16;
// values are wrapped into the type.
class Ids {
 public:
  Ids(IntType type, int64_t layers, int64_t size, int64_t stride, int64_t shift = 0)
      : type_(type),
        size_(size),
        stride_(stride),
        shift_(shift),
        bytes_(static_cast<size_t>(shift + layers * size * stride * bytes_of(type))) {}

  void set(int64_t layer, int64_t i, int64_t value) {
    std::memcpy(place(layer, i), &value, static_cast<size_t>(bytes_of(type_)));
  }

  int64_t get(int64_t layer, int64_t i) {
    const void* at = place(layer, i);
    switch (type_) {
      case IntType::kInt8:
        return *static_cast<const int8_t*>(at);
      case IntType::kUInt8:
        return *static_cast<const uint8_t*>(at);
      case IntType::kInt16:
        return *static_cast<const int16_t*>(at);
      case IntType::kInt32:
        return *static_cast<const int32_t*>(at);
      case IntType::kInt64:
        return *static_cast<const int64_t*>(at);
    }
    return 0;
  }

  Integers view() { return {bytes_.data() + shift_, size_ * stride_, stride_, type_}; }

 private:
  unsigned char* place(int64_t layer, int64_t i) {
    return bytes_.data() + shift_ + (layer * size_ + i) * stride_ * bytes_of(type_);
  }

  IntType type_;
  int64_t size_, stride_, shift_;
  Guarded<unsigned char> bytes_;
};

// Ids as people and programs send them: inside, around the edges, far outside, all the same, in runs.
void fill(Ids& ids, int64_t layers, int64_t size, int64_t limit) {
  const int64_t kind = draw(0, 5);
  const int64_t favourite = draw(-1, limit);
  const int64_t extremes[] = {std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max(),
                              int64_t{1} << 31, (int64_t{1} << 32) + 1, 1 - (int64_t{1} << 32), limit, -1};
  for (int64_t layer = 0; layer < layers; ++layer) {
    for (int64_t i = 0; i < size; ++i) {
      int64_t value = draw(0, limit - 1);
      if (kind == 1) value = draw(-2, limit + 1);
      if (kind == 2) value = favourite;
      if (kind == 3 && draw(0, 3) == 0) value = extremes[draw(0, 6)];
      if (kind == 4) value = std::min(draw(0, limit - 1), draw(0, limit - 1));
      if (kind == 5) value = i * limit / std::max<int64_t>(size, 1);
      ids.set(layer, i, value);
    }
  }
}

struct Case {
  int64_t layers = 1, tokens = 0, vocab_size = 0;
  int num_experts = 1;
  bool by_hash = false, masked = false;
  IntType id_type = IntType::kInt64, table_type = IntType::kUInt8;
  int64_t stride = 1;

  std::string text() const {
    return "L=" + std::to_string(layers) + " N=" + std::to_string(tokens) + " E=" + std::to_string(num_experts) +
           " V=" + std::to_string(vocab_size) + (by_hash ? " by hash" : "") + (masked ? " masked" : "") +
           " types " + std::to_string(static_cast<int>(id_type)) + "," + std::to_string(static_cast<int>(table_type)) +
           " stride " + std::to_string(stride) + " seed " + std::to_string(emulation::options().seed);
  }
};

template <typename T>
void check_equal(const char* name, const std::vector<T>& wanted, T* got, const Case& c) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    CHECK(wanted[i] == got[i], "%s[%zu]: expected %lld, got %lld; %s", name, i, static_cast<long long>(wanted[i]),
          static_cast<long long>(got[i]), c.text().c_str());
  }
}

// What one layer must give, by counting.
void check_layer(const Case& c, int64_t layer, const std::vector<int64_t>& experts, Guarded<int32_t>& offsets,
                 Guarded<int32_t>& row_to_assignment, Guarded<int32_t>& assignment_to_row) {
  const int num_experts = c.num_experts;
  std::vector<std::vector<int32_t>> tokens_of(static_cast<size_t>(num_experts) + 1);
  for (size_t t = 0; t < experts.size(); ++t) {
    const bool routed = experts[t] >= 0 && experts[t] < num_experts;
    tokens_of[routed ? static_cast<size_t>(experts[t]) : tokens_of.size() - 1].push_back(static_cast<int32_t>(t));
  }
  std::vector<int32_t> starts, rows, inverse(experts.size());
  for (const auto& tokens : tokens_of) {
    starts.push_back(static_cast<int32_t>(rows.size()));
    rows.insert(rows.end(), tokens.begin(), tokens.end());
  }
  for (size_t r = 0; r < rows.size(); ++r) inverse[static_cast<size_t>(rows[r])] = static_cast<int32_t>(r);
  check_equal("offsets", starts, offsets.data() + layer * (num_experts + 1), c);
  check_equal("row_to_assignment", rows, row_to_assignment.data() + layer * c.tokens, c);
  check_equal("assignment_to_row", inverse, assignment_to_row.data() + layer * c.tokens, c);
}

// A mask of a random kind, and which tokens it keeps.
struct RandomMask {
  RandomMask(int64_t tokens, bool masked) : keep(static_cast<size_t>(tokens), true) {
    view = {};
    if (!masked) return;
    view.bytes = 1 << draw(0, 3);
    view.is_float = view.bytes > 1 && draw(0, 1) == 1;
    view.stride = draw(1, 2);
    bytes = std::make_unique<Guarded<unsigned char>>(static_cast<size_t>(tokens * view.stride * view.bytes));
    for (int64_t t = 0; t < tokens; ++t) {
      const uint64_t minus_zero = uint64_t{1} << (8 * view.bytes - 1);
      const uint64_t values[] = {0, 1, minus_zero, minus_zero >> 1, ~uint64_t{0}};
      const int64_t kind = draw(0, 4);
      keep[static_cast<size_t>(t)] = kind != 0 && !(view.is_float && kind == 2);
      std::memcpy(bytes->data() + t * view.stride * view.bytes, &values[kind], static_cast<size_t>(view.bytes));
    }
    view.data = bytes->data();
  }

  mbk::Mask view;
  std::vector<bool> keep;
  std::unique_ptr<Guarded<unsigned char>> bytes;
};

void run(const Case& c) {
  const int64_t id_layers = c.by_hash ? 1 : c.layers;
  Ids ids(c.id_type, id_layers, c.tokens, c.stride);
  const int64_t shift = bytes_of(c.table_type) == 1 ? draw(0, 15) : 0;
  Ids tables(c.table_type, c.layers, c.vocab_size, c.stride, shift);
  fill(ids, id_layers, c.tokens, c.by_hash ? c.vocab_size : c.num_experts);
  fill(tables, c.layers, c.vocab_size, c.num_experts);
  RandomMask mask(c.tokens, c.masked);
  mbk::TokenLookup lookup = {ids.view(), {}, mask.view, c.vocab_size};
  if (c.by_hash) {
    lookup.token_ids.stride_layer = 0;
    lookup.tables = tables.view();
  }

  const auto rows = static_cast<size_t>(c.layers * c.tokens);
  Guarded<int32_t> offsets(static_cast<size_t>(c.layers * (c.num_experts + 1))), row_to_assignment(rows), assignment_to_row(rows);
  Guarded<unsigned char> workspace(
      static_cast<size_t>(mbk::group_tokens_workspace_bytes(c.layers, c.tokens, c.num_experts)));
  mbk::GroupTokensParams params = {};
  params.lookup = lookup;
  params.by_hash = c.by_hash;
  params.offsets = offsets.data();
  params.row_to_assignment = row_to_assignment.data();
  params.assignment_to_row = assignment_to_row.data();
  params.workspace = workspace.data();
  params.layers = c.layers;
  params.tokens = c.tokens;
  params.num_experts = c.num_experts;
  CHECK(mbk::group_tokens(params) == cudaSuccess, "%s", c.text().c_str());
  cudaDeviceSynchronize();

  for (int64_t layer = 0; layer < c.layers; ++layer) {
    std::vector<int64_t> experts;
    for (int64_t t = 0; t < c.tokens; ++t) {
      int64_t expert = ids.get(c.by_hash ? 0 : layer, t);
      if (c.by_hash) {
        const bool inside = expert >= 0 && expert < c.vocab_size && mask.keep[static_cast<size_t>(t)];
        expert = inside ? tables.get(layer, expert) : -1;
        if (expert < std::numeric_limits<int32_t>::min() || expert > std::numeric_limits<int32_t>::max()) expert = -1;
      } else if (!mask.keep[static_cast<size_t>(t)]) {
        expert = -1;
      }
      experts.push_back(expert);
    }
    check_layer(c, layer, experts, offsets, row_to_assignment, assignment_to_row);
  }
}

Case random_case(int64_t max_tokens, int64_t max_experts) {
  Case c;
  c.tokens = draw(0, max_tokens);
  c.num_experts = static_cast<int>(draw(1, max_experts));
  c.layers = draw(1, 3);
  c.by_hash = draw(0, 1) == 1;
  c.masked = draw(0, 2) == 0;
  c.id_type = static_cast<IntType>(draw(0, 4));
  c.table_type = static_cast<IntType>(draw(0, 4));
  c.stride = draw(0, 3) == 0 ? 2 : 1;
  c.vocab_size = draw(0, 90);
  emulation::options().seed = random_numbers();
  return c;
}

void look_back_kernel(const uint64_t* words, int64_t block, unsigned* sum) {
  const unsigned got = mbk::look_back(words, block, 1);
  if (threadIdx.x == 0) *sum = got;
}

// In a whole run blocks rarely lag so far behind that the look-back needs many steps; here they do.
void run_look_back() {
  const int64_t blocks = draw(1, 200), complete = draw(0, blocks - 1);
  Guarded<uint64_t> words(static_cast<size_t>(blocks));
  unsigned up_to_here = 0, wanted = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    const auto own = static_cast<unsigned>(draw(0, 9000));
    up_to_here += own;
    wanted = i <= complete ? up_to_here : wanted + own;
    const bool known = i == 0 || i == complete || (i < complete && draw(0, 1) == 1);
    words[static_cast<size_t>(i)] = known ? mbk::kUpToThisBlock | up_to_here : mbk::kOfThisBlock | own;
  }
  Guarded<unsigned> sum(1);
  static mbk::Launcher launcher(0);
  launcher(look_back_kernel, {1, 32, 0, 0, false, nullptr}, static_cast<const uint64_t*>(words.data()), blocks,
           sum.data());
  cudaDeviceSynchronize();
  CHECK(sum[0] == wanted, "look-back over %lld blocks: expected %u, got %u", static_cast<long long>(blocks), wanted,
        sum[0]);
}

}  // namespace

int main() {
  int cases = 0;
  for (int i = 0; i < 20; ++i, ++cases) {  // experts of several warps, and warps without any
    emulation::options().resident_blocks = i % 2 == 0 ? 12 : 2 + i % 5;  // 12: those that place beside those that count
    Case c = random_case(1, i % 2 == 0 ? 6 : 100);
    c.tokens = draw(16385, 16500);
    c.layers = 1;
    c.vocab_size = draw(1, 4000);
    run(c);
  }
  for (unsigned resident : {1, 2, 5}) {  // the look-back, with as few blocks at a time as can be
    emulation::options().resident_blocks = resident;
    for (int64_t tokens : {16385, 24576, 50000}) {
      Case c = random_case(1, resident == 2 ? 90 : 8);
      c.tokens = tokens;
      c.layers = tokens > 30000 ? 1 : 2;
      c.vocab_size = draw(1, 4000);
      run(c);
      ++cases;
    }
  }
  emulation::options().resident_blocks = 2;
  Case many = random_case(1, 4);  // more blocks before the last one than a warp looks at together
  many.tokens = 35 * 8192 + 17;
  many.layers = 1;
  run(many);
  emulation::options().resident_blocks = 4;
  for (int i = 0; i < 500; ++i, ++cases) run_look_back();
  for (int i = 0; i < 2500; ++i, ++cases) run(random_case(i % 10 == 0 ? 700 : 130, i % 4 == 0 ? 80 : 7));
  for (int experts : {1, 2, 31, 32, 33, 63, 64, 65, 255, 256, 1023, 1024}) {
    for (int i = 0; i < 6; ++i, ++cases) {
      Case c = random_case(400, 1);
      c.num_experts = experts;
      run(c);
    }
  }
  for (int64_t tokens : {0, 1, 31, 32, 33, 1023, 1024, 1025, 4096, 4097, 16384}) {  // where the launch changes
    for (int i = 0; i < 2; ++i, ++cases) {
      Case c = random_case(1, i == 0 ? 8 : 100);
      c.tokens = tokens;
      c.vocab_size = draw(1, 4000);
      run(c);
    }
  }
  std::printf("%d cases\n", cases + 1);
  return 0;
}
