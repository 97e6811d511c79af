// What XLA calls (https://docs.jax.dev/en/latest/ffi.html): polygpt/kernels/native/__init__.py registers these targets.

#include <vector>

#include "attention.h"
#include "products.h"
#include "threads.h"

namespace polygpt {
namespace {

namespace ffi = xla::ffi;

// The rows of x with numbers other than zero. Those of zeros, which free slots have, are given their zeros.
std::vector<Row> rows_to_multiply(const float* x, int64_t inputs, float* y, int64_t outputs, int64_t count) {
  std::vector<Row> rows;
  for (int64_t r = 0; r < count; r++, x += inputs, y += outputs) {
    if (std::any_of(x, x + inputs, [](float number) { return number != 0; })) rows.push_back({x, y});
    else std::fill_n(y, outputs, 0.0f);
  }
  return rows;
}

// Layers in a stack; it is a single one without an axis for them.
int64_t layers_of(ffi::AnyBuffer::Dimensions sizes, size_t axes) { return sizes.size() > axes ? sizes[0] : 1; }

// The layer that XLA's slices would take: a negative index counts from the end, and one beyond the ends is moved inside.
int64_t inside(int64_t layer, int64_t layers) {
  return std::max<int64_t>(0, std::min(layer < 0 ? layer + layers : layer, layers - 1));
}

// Whether a buffer has as many numbers as will be read from it.
template <class Buffer>
bool holds(const Buffer& buffer, int64_t count) { return int64_t(buffer.element_count()) == count; }

template <class Buffer>
bool holds_or_none(const Buffer& buffer, int64_t count) { return holds(buffer, 0) || holds(buffer, count); }

ffi::Error unfit() { return ffi::Error::InvalidArgument("sizes that do not go together"); }

template <class T>
void multiply(ThreadPool& pool, const std::vector<Row>& rows, const T* weights, const float* scale, int64_t inputs,
              int64_t outputs) {
  const int64_t size = part_size(pool, outputs, OUTPUTS), count = rows.size();
  const Row* first = rows.data();
  in_parallel(pool, (outputs + size - 1) / size, [=](int64_t part) {
    const int64_t from = part * size, to = std::min(outputs, from + size);
    all_rows(count, [&](auto few, int64_t row) { some_rows<few>(first + row, weights, scale, inputs, from, to); });
  });
}

using Rows = ffi::Buffer<ffi::F32, 2>;
using Layer = ffi::Buffer<ffi::S32, 1>;

// `values` is [O, I] or a stack [L, O, I] of layers, `scale` [O] or [L, O], or [0] for none.
ffi::Error Product(ffi::ThreadPool pool, Rows x, ffi::AnyBuffer values, ffi::Buffer<ffi::F32> scale, Layer layer,
                   ffi::Result<Rows> y) {
  const int64_t inputs = x.dimensions()[1], outputs = y->dimensions()[1], layers = layers_of(values.dimensions(), 2);
  if (!holds(values, layers * outputs * inputs) || !holds_or_none(scale, layers * outputs)) return unfit();
  const int64_t index = inside(layer.typed_data()[0], layers);
  const float* scales = scale.element_count() ? scale.typed_data() + index * outputs : nullptr;
  const auto rows = rows_to_multiply(x.typed_data(), inputs, y->typed_data(), outputs, x.dimensions()[0]);
  auto with = [&](auto* weights) {
    multiply(pool, rows, weights + index * outputs * inputs, scales, inputs, outputs);
    return ffi::Error::Success();
  };
  switch (values.element_type()) {
    case ffi::F32: return with(values.typed_data<float>());
    case ffi::S8: return with(values.typed_data<int8_t>());
    case ffi::U16: return with(values.typed_data<uint16_t>());
    default: return ffi::Error::InvalidArgument("weights are float32, int8, or the bits of bfloat16");
  }
}

// See PackedInt4: [.., blocks, 8, I], [.., blocks, I], [.., blocks, I], [.., blocks, 16].
ffi::Error ProductInt4(ffi::ThreadPool pool, Rows x, ffi::Buffer<ffi::U8> nibbles, ffi::Buffer<ffi::U8> step,
                       ffi::Buffer<ffi::U8> zero, ffi::Buffer<ffi::F32> unit, Layer layer, ffi::Result<Rows> y) {
  const int64_t inputs = x.dimensions()[1], outputs = y->dimensions()[1];
  const int64_t blocks = (outputs + GROUP - 1) / GROUP, layers = layers_of(nibbles.dimensions(), 3);
  const int64_t all = layers * blocks, start = inside(layer.typed_data()[0], layers) * blocks;
  if (!holds(nibbles, all * HALF * inputs) || !holds(step, all * inputs) || !holds(zero, all * inputs)) return unfit();
  if (!holds(unit, all * GROUP)) return unfit();
  const Int4 packed{nibbles.typed_data() + start * HALF * inputs, step.typed_data() + start * inputs,
                    zero.typed_data() + start * inputs, unit.typed_data() + start * GROUP};
  const auto rows = rows_to_multiply(x.typed_data(), inputs, y->typed_data(), outputs, x.dimensions()[0]);
  const int64_t size = part_size(pool, blocks, 1), count = rows.size();
  const Row* first = rows.data();
  in_parallel(pool, (blocks + size - 1) / size, [=](int64_t part) {
    for (int64_t block = part * size; block < std::min(blocks, (part + 1) * size); block++)
      all_rows(count, [&](auto few, int64_t row) { int4_block<few>(first + row, packed, block, inputs, outputs); });
  });
  return ffi::Error::Success();
}

using Numbers = ffi::Buffer<ffi::F32>;
using Heads = ffi::Buffer<ffi::F32, 4>;
using Whole = ffi::Buffer<ffi::S32, 2>;

bool fits(const Cache& cache, int64_t layers, ffi::AnyBuffer k, ffi::AnyBuffer v, Whole positions, Whole last) {
  const int64_t stored = layers * cache.rows * cache.kv_heads * cache.slots * cache.dim;
  const bool own = positions.dimensions()[0] == cache.rows || positions.dimensions()[0] == 1;
  return holds(k, stored) && holds(v, stored) && k.element_type() == v.element_type() && own &&
         positions.dimensions()[1] == cache.tokens && holds(last, cache.rows) && cache.heads % cache.kv_heads == 0;
}

// q [B, T, N, H]; k, v [.., B, K, S, H] as they are stored; positions [1 or B, T], last [B, 1], reach [1]; slopes and
// sinks [N], or [0] for none.
ffi::Error Attention(ThreadPool pool, Heads q, ffi::AnyBuffer k, ffi::AnyBuffer v, Whole positions, Whole last,
                     Layer reach, Numbers slopes, Numbers sinks, Layer layer, float scale, int64_t window,
                     float softcap, ffi::Result<Heads> out) {
  if (k.dimensions().size() < 4) return unfit();
  const auto queries = q.dimensions(), stored = k.dimensions().last(4);
  const Cache cache{queries[0], queries[1], queries[2], stored[1], stored[2], queries[3]};
  const int64_t layers = layers_of(k.dimensions(), 4), index = inside(layer.typed_data()[0], layers);
  if (!fits(cache, layers, k, v, positions, last)) return unfit();
  if (!holds_or_none(slopes, cache.heads) || !holds_or_none(sinks, cache.heads)) return unfit();
  if (cache.dim > HEAD_DIM) return ffi::Error::InvalidArgument("heads of more than 256 numbers");
  const Rule rule{scale, softcap, std::min<int64_t>(window, std::numeric_limits<int32_t>::max())};
  const int64_t end = std::min<int64_t>(cache.slots, int64_t(reach.typed_data()[0]) + 1);
  const int64_t group = cache.heads / cache.kv_heads;
  const bool shared = positions.dimensions()[0] == 1;
  const int32_t *where = positions.typed_data(), *lasts = last.typed_data();
  const float *in = q.typed_data(), *slope = slopes.element_count() ? slopes.typed_data() : nullptr;
  const float* sink = sinks.element_count() ? sinks.typed_data() : nullptr;
  float* result = out->typed_data();
  auto with = [&](auto* keys, auto* values) {
    const int64_t matrix = cache.slots * cache.dim;
    const int64_t start = index * cache.rows * cache.kv_heads * matrix;
    keys += start, values += start;
    const int64_t many = cache.tokens * group, blocks = (many + QUERIES - 1) / QUERIES;
    in_parallel(pool, cache.rows * cache.kv_heads * blocks, [=](int64_t part) {
      // A row's last queries see most, and come first.
      const int64_t matrix_of = part / blocks, row = matrix_of / cache.kv_heads, kv_head = matrix_of % cache.kv_heads;
      const int64_t from = (blocks - 1 - part % blocks) * QUERIES;
      Query queries[QUERIES];
      int64_t count = 0, furthest = 0;
      for (int64_t n = from; n < std::min(many, from + QUERIES); n++) {
        const int64_t token = n / group, head = kv_head * group + n % group;
        const int64_t position = where[(shared ? 0 : row) * cache.tokens + token];
        const int64_t place = ((row * cache.tokens + token) * cache.heads + head) * cache.dim;
        if (position > lasts[row]) {  // padding, or a free slot, whose row stays zeros for the next product
          std::fill_n(result + place, cache.dim, 0.0f);
          continue;
        }
        queries[count++] = {{in + place, result + place}, position, slope ? slope[head] : 0, sink ? sink + head : nullptr};
        furthest = std::max(furthest, position);
      }
      // A slot holds no position before its own number: no query sees a slot beyond its own position.
      attend(queries, count, keys + matrix_of * matrix, values + matrix_of * matrix, rule, lasts[row],
             std::min(end, furthest + 1), cache);
    });
    return ffi::Error::Success();
  };
  switch (k.element_type()) {
    case ffi::F32: return with(k.typed_data<float>(), v.typed_data<float>());
    case ffi::U16: return with(k.typed_data<uint16_t>(), v.typed_data<uint16_t>());
    default: return ffi::Error::InvalidArgument("a cache is float32, or the bits of bfloat16");
  }
}

}  // namespace
}  // namespace polygpt

XLA_FFI_DEFINE_HANDLER_SYMBOL(polygpt_product, polygpt::Product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<polygpt::Rows>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<polygpt::Layer>()
                                  .Ret<polygpt::Rows>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(polygpt_product_int4, polygpt::ProductInt4,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<polygpt::Rows>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<polygpt::Layer>()
                                  .Ret<polygpt::Rows>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(polygpt_attention, polygpt::Attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<polygpt::Heads>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<polygpt::Whole>()
                                  .Arg<polygpt::Whole>()
                                  .Arg<polygpt::Layer>()
                                  .Arg<polygpt::Numbers>()
                                  .Arg<polygpt::Numbers>()
                                  .Arg<polygpt::Layer>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap")
                                  .Ret<polygpt::Heads>());
