#include "group_tokens.cuh"

#include <algorithm>

namespace mbk {
namespace {

using LayerKernel = void (*)(GroupTokensArguments);

LayerKernel layer_kernel(int64_t tokens, bool packed) {
  if (tokens <= 1024) return packed ? group_layer_kernel<1, true> : group_layer_kernel<1, false>;
  if (tokens <= 4096) return packed ? group_layer_kernel<4, true> : group_layer_kernel<4, false>;
  return packed ? group_layer_kernel<16, true> : group_layer_kernel<16, false>;
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
      params.lookup.vocab_size > INT32_MAX || params.num_tile_maps > kMaxTileMaps) {
    return cudaErrorInvalidValue;
  }
  const int64_t blocks = blocks_of_layer(tokens);
  const bool packed = num_experts <= kMaxPackedExperts;
  GroupTokensArguments arguments = {};
  arguments.lookup = params.lookup;
  arguments.offsets = params.offsets;
  arguments.row_to_assignment = params.row_to_assignment;
  arguments.assignment_to_row = params.assignment_to_row;
  for (int i = 0; i < params.num_tile_maps; ++i) arguments.tile_maps[i] = params.tile_maps[i];
  arguments.num_tile_maps = params.num_tile_maps;
  arguments.blocks = blocks;
  arguments.tokens = tokens;
  arguments.num_experts = num_experts;
  arguments.by_hash = params.by_hash;
  arguments.stage_table = stages_table(params, blocks == 1 ? tokens : kTokensOfTask);
  const int64_t staged = arguments.stage_table ? params.lookup.vocab_size : 0;

  if (blocks == 1) {
    const int items = tokens <= 1024 ? 1 : tokens <= 4096 ? 4 : 16;
    const int64_t warps = tokens == 0 ? 1 : ceil_div(tokens, kWarpSize * items);
    const int64_t shared = group_tokens_shared_bytes(num_experts, static_cast<int>(warps), staged);
    MBK_RETURN_IF_ERROR(launch(layer_kernel(tokens, packed), layers, static_cast<int>(warps) * kWarpSize,
                               static_cast<size_t>(shared), params.stream, arguments));
    return cudaGetLastError();
  }
  arguments.ticket = static_cast<unsigned*>(params.workspace);
  arguments.words = static_cast<uint64_t*>(params.workspace) + 1;
  const int64_t bytes = group_tokens_workspace_bytes(layers, tokens, num_experts);
  MBK_RETURN_IF_ERROR(cudaMemsetAsync(params.workspace, 0, static_cast<size_t>(bytes), params.stream));
  const int64_t shared = group_tokens_shared_bytes(num_experts, kTaskThreads / kWarpSize, staged);
  MBK_RETURN_IF_ERROR(launch(packed ? group_tasks_kernel<true> : group_tasks_kernel<false>, 2 * layers * blocks,
                             kTaskThreads, static_cast<size_t>(shared), params.stream, arguments, layers));
  return cudaGetLastError();
}

}  // namespace mbk
