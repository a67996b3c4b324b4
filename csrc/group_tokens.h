// Grouping: sort the assignments of tokens to experts by expert, stably, for all layers in one launch.
#pragma once

#include "token_lookup.h"

namespace mbk {

constexpr int kMaxGroupedExperts = 1024;

struct GroupTokensParams {
  TokenLookup lookup;
  bool by_hash;           // else `lookup.token_ids` holds expert ids (L, N) and the tables are not looked at
  int32_t* offsets;       // (L, E + 1)
  int32_t* row_to_assignment;  // (L, N)
  int32_t* assignment_to_row;  // (L, N)
  void* workspace;  // group_tokens_workspace_bytes, aligned to 8; any content
  int64_t layers;
  int64_t tokens;   // N, below 2^31
  int num_experts;  // 1 to kMaxGroupedExperts
  cudaStream_t stream;
};

// 0 where one block does a layer.
int64_t group_tokens_workspace_bytes(int64_t layers, int64_t tokens, int num_experts);

// The most dynamic shared memory that a launch takes, for up to 64 experts (`packed`) or more.
int64_t group_tokens_most_shared_bytes(bool packed);

// Traffic of a layer: the ids, the mask and the table once, the two permutations once (three times with a workspace).
cudaError_t group_tokens(const GroupTokensParams& params);

}  // namespace mbk
