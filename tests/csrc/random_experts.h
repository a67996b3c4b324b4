// What random problems of the expert GEMMs have in common: numbers, and rows that are dealt to experts.
#pragma once

#include <algorithm>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include "emulation.h"
#include "testing.h"

namespace cases {

inline std::mt19937_64 random_numbers(31);

inline int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_numbers); }

template <typename T>
T rounded(float value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

inline size_t at(int i) { return static_cast<size_t>(i); }
inline size_t size(int rows, int columns) { return at(rows) * at(columns); }

// Small multiples of 1/4, so that every order of summing gives the same float.
template <typename T>
void fill(Guarded<T>& values) {
  for (T& value : values) value = rounded<T>(static_cast<float>(draw(-3, 3)) * 0.25f);
}

// Assignments in the order of their experts, of which one may have most, and the offsets (experts + 1) of the rows;
// the last rows have no expert.
inline void deal(int experts, Guarded<int>& row_to_assignment, Guarded<int>& offsets) {
  std::vector<int> expert(row_to_assignment.size());
  const int favourite = draw(0, experts), share = draw(0, 10);  // `experts`: no expert
  for (int& e : expert) e = draw(0, 9) < share ? favourite : draw(0, experts);
  std::iota(row_to_assignment.begin(), row_to_assignment.end(), 0);
  std::stable_sort(row_to_assignment.begin(), row_to_assignment.end(),
                   [&](int i, int j) { return expert[at(i)] < expert[at(j)]; });
  for (int e = 0; e <= experts; ++e) {
    offsets[at(e)] = static_cast<int>(std::count_if(expert.begin(), expert.end(), [&](int i) { return i < e; }));
  }
}

}  // namespace cases
