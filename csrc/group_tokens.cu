#include "group_tokens.cuh"

#include <algorithm>

namespace mbk {
namespace {

template <int ITEMS, bool PACKED>
cudaError_t launch_layers(const LaunchShape& shape, const GroupTokensArguments& arguments) {
  static Launcher launch(group_tokens_most_shared_bytes(PACKED));
  return launch(group_layer_kernel<ITEMS, PACKED>, shape, arguments);
}

template <bool PACKED>
cudaError_t launch_tasks(const LaunchShape& shape, const GroupTokensArguments& arguments, int64_t layers) {
  static Launcher launch(group_tokens_most_shared_bytes(PACKED));
  return launch(group_tasks_kernel<PACKED>, shape, arguments, layers);
}

template <bool PACKED>
cudaError_t launch_layers(int items, const LaunchShape& shape, const GroupTokensArguments& arguments) {
  return items == 1   ? launch_layers<1, PACKED>(shape, arguments)
         : items == 4 ? launch_layers<4, PACKED>(shape, arguments)
                      : launch_layers<16, PACKED>(shape, arguments);
}

int64_t blocks_of_layer(int64_t tokens) { return tokens <= kMaxTokensOfBlock ? 1 : ceil_div(tokens, kTokensOfTask); }

// Copying the table into shared memory pays once a block looks up about as often as the table has 16-byte pieces.
bool stages_table(const GroupTokensParams& params, int64_t tokens_of_block) {
  const int64_t vocab_size = params.lookup.vocab_size;
  return params.by_hash && params.num_experts <= 255 && vocab_size <= kMaxStagedVocabulary &&
         tokens_of_block >= vocab_size / 16;
}

}  // namespace

int64_t group_tokens_workspace_bytes(int64_t layers, int64_t tokens, int num_experts) {
  const int64_t blocks = blocks_of_layer(tokens);
  return blocks == 1 ? 0 : (1 + layers * blocks * (num_experts + 1)) * static_cast<int64_t>(sizeof(uint64_t));
}

int64_t group_tokens_most_shared_bytes(bool packed) {
  constexpr int kMostWarps = kTaskThreads / kWarpSize;
  const int64_t staged = group_tokens_shared_bytes(packed ? kMaxPackedExperts : 255, kMostWarps, kMaxStagedVocabulary);
  return packed ? staged : std::max(staged, group_tokens_shared_bytes(kMaxGroupedExperts, kMostWarps, 0));
}

cudaError_t group_tokens(const GroupTokensParams& params) {
  const int64_t layers = params.layers, tokens = params.tokens;
  const int num_experts = params.num_experts;
  if (layers == 0) return cudaSuccess;
  if (num_experts < 1 || num_experts > kMaxGroupedExperts || tokens > INT32_MAX ||
      params.lookup.vocab_size > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  const int64_t blocks = blocks_of_layer(tokens);
  const bool packed = num_experts <= kMaxPackedExperts;
  GroupTokensArguments arguments = {};
  arguments.lookup = params.lookup;
  arguments.offsets = params.offsets;
  arguments.row_to_assignment = params.row_to_assignment;
  arguments.assignment_to_row = params.assignment_to_row;
  arguments.blocks = blocks;
  arguments.tokens = tokens;
  arguments.num_experts = num_experts;
  arguments.by_hash = params.by_hash;
  arguments.stage_table = stages_table(params, blocks == 1 ? tokens : kTokensOfTask);
  const int64_t staged = arguments.stage_table ? params.lookup.vocab_size : 0;
  const auto shape = [&](int64_t number, int warps) {
    const auto shared = static_cast<int>(group_tokens_shared_bytes(num_experts, warps, staged));
    return LaunchShape{number, warps * kWarpSize, shared, 0, false, params.stream};
  };

  if (blocks == 1) {
    const int items = tokens <= 1024 ? 1 : tokens <= 4096 ? 4 : 16;
    const int warps = tokens == 0 ? 1 : static_cast<int>(ceil_div(tokens, kWarpSize * items));
    return packed ? launch_layers<true>(items, shape(layers, warps), arguments)
                  : launch_layers<false>(items, shape(layers, warps), arguments);
  }
  arguments.ticket = static_cast<unsigned*>(params.workspace);
  arguments.words = static_cast<uint64_t*>(params.workspace) + 1;
  const int64_t bytes = group_tokens_workspace_bytes(layers, tokens, num_experts);
  MBK_RETURN_IF_ERROR(cudaMemsetAsync(params.workspace, 0, static_cast<size_t>(bytes), params.stream));
  const LaunchShape tasks = shape(2 * layers * blocks, kTaskThreads / kWarpSize);
  return packed ? launch_tasks<true>(tasks, arguments, layers) : launch_tasks<false>(tasks, arguments, layers);
}

}  // namespace mbk
