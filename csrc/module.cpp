// fastckpt._C: the only file that knows Python. Buffers and integers come in, work runs without the GIL.
#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>

#include "copy_cpu.h"
#include "copy_cuda.h"
#include "digest.h"
#include "error.h"
#include "isa.h"
#include "mapping.h"
#include "tiles_host.h"

namespace py = pybind11;
using namespace fastckpt;

namespace {

// The bytes behind a C-contiguous object of the buffer protocol, held until the end of a call.
class Held {
  public:
    explicit Held(const py::object& object, bool writable = false) {
        if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0) throw py::error_already_set();
    }
    ~Held() { PyBuffer_Release(&view_); }
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;

    char* data() const { return static_cast<char*>(view_.buf); }
    size_t nbytes() const { return static_cast<size_t>(view_.len); }
    template <class T> T* items() const { return reinterpret_cast<T*>(view_.buf); }
    // The number of T it holds. Throws std::invalid_argument when it holds no whole number of them.
    template <class T> size_t count(const char* what) const {
        if (nbytes() % sizeof(T) != 0)
            throw std::invalid_argument(std::string(what) + ": " + std::to_string(nbytes()) + " bytes are no whole number of " +
                                        std::to_string(sizeof(T)) + "-byte items");
        return nbytes() / sizeof(T);
    }

  private:
    Py_buffer view_;
};

// Throws std::invalid_argument unless [offset, offset + size) lies inside `nbytes`.
void check_inside(const char* what, int64_t offset, int64_t size, size_t nbytes) {
    if (offset < 0 || size < 0 || static_cast<uint64_t>(offset) + static_cast<uint64_t>(size) > nbytes)
        throw std::invalid_argument(std::string(what) + ": [" + std::to_string(offset) + ", +" + std::to_string(size) +
                                    ") is outside a buffer of " + std::to_string(nbytes) + " bytes");
}

std::unique_ptr<Recent> make_recent(const py::object& addresses, const py::object& mapped, uint64_t limit) {
    Held a(addresses), m(mapped);
    const size_t n = a.count<uint64_t>("addresses");
    if (m.count<uint64_t>("mapped") != n) throw std::invalid_argument("Recent: addresses and mapped differ in length");
    return std::make_unique<Recent>(a.items<uint64_t>(), m.items<uint64_t>(), n, limit);
}

void py_copy_rows(const py::object& rows, const py::object& sources, const py::object& destinations, int threads, int isa,
                  Recent* recent) {
    Held r(rows), s(sources), d(destinations);
    const Rows work{r.items<Copy>(), r.count<Copy>("rows"), s.items<uint64_t>(), s.count<uint64_t>("sources"),
                    d.items<uint64_t>(), d.count<uint64_t>("destinations"), recent};
    if (recent != nullptr && recent->count() != work.source_count)
        throw std::invalid_argument("recent: " + std::to_string(recent->count()) + " sources, got " + std::to_string(work.source_count));
    py::gil_scoped_release free;
    copy_rows(work, threads, isa);
}

uint64_t py_digest64(const py::object& buffer) {
    Held b(buffer);
    py::gil_scoped_release free;
    return digest64(b.data(), b.nbytes());
}

void py_leaf_digests(const py::object& buffer, const py::object& offsets, const py::object& sizes, const py::object& out) {
    Held b(buffer), o(offsets), s(sizes), result(out, true);
    const size_t n = o.count<int64_t>("offsets");
    if (s.count<int64_t>("sizes") != n || result.count<uint64_t>("out") != n)
        throw std::invalid_argument("leaf_digests: offsets, sizes and out differ in length");
    for (size_t i = 0; i < n; ++i) check_inside("leaf_digests", o.items<int64_t>()[i], s.items<int64_t>()[i], b.nbytes());
    py::gil_scoped_release free;
    for (size_t i = 0; i < n; ++i)
        result.items<uint64_t>()[i] = digest64(b.data() + o.items<int64_t>()[i], static_cast<size_t>(s.items<int64_t>()[i]));
}

uint32_t py_crc32(const py::object& buffer, uint32_t value) {
    Held b(buffer);
    py::gil_scoped_release free;
    return crc32(b.data(), b.nbytes(), value);
}

uint64_t py_nonfinite(const py::object& buffer, int code) {
    if (code < 0 || code >= DTYPES) throw std::invalid_argument("nonfinite: no dtype has the code " + std::to_string(code));
    Held b(buffer);
    if (b.nbytes() % ITEMSIZE[code] != 0)
        throw std::invalid_argument("nonfinite: " + std::to_string(b.nbytes()) + " bytes are no whole number of elements");
    py::gil_scoped_release free;
    return kernels(-1).nonfinite(b.data(), b.nbytes() / ITEMSIZE[code], static_cast<Dtype>(code));
}

void check_dense(const char* what, size_t nbytes, int code, size_t rows, size_t columns) {
    if (code != FLOAT32 && code != BFLOAT16 && code != FLOAT16)
        throw std::invalid_argument(std::string(what) + ": the dtype " + std::to_string(code) + " is not fp32, bf16 or fp16");
    const size_t size = ITEMSIZE[code];
    if (rows == 0 || columns == 0 || nbytes / size / columns != rows || nbytes != rows * columns * size)
        throw std::invalid_argument(std::string(what) + ": " + std::to_string(nbytes) + " bytes are not " +
                                    std::to_string(rows) + " x " + std::to_string(columns) + " values");
}

bool py_quantise(const py::object& dense, int code, size_t rows, size_t columns, size_t pitch, size_t block_rows,
                 size_t block_columns, float reach, float floor, float lowest, bool reciprocal, bool half, bool power, int kind,
                 const py::object& amax, const py::object& out, const py::object& scales, const py::object& zeros,
                 const py::object& sums, int isa) {
    Held d(dense), o(out, true), s(scales, true), t(sums, true);
    if (kind < QUANT_INT8 || kind >= QUANT_KINDS) throw std::invalid_argument("quantise: no kind " + std::to_string(kind));
    const bool packed = kind >= QUANT_INT4, turned = kind == QUANT_INT4_AWQ || kind == QUANT_INT4_DOWN;
    size_t held = d.nbytes();
    if (turned) {  // what lies between the columns does not count
        const size_t line = rows * (code == FLOAT32 ? 4 : 2);
        if (line == 0 || pitch < line || columns == 0 || held < line || (held - line) / pitch != columns - 1 ||
            (held - line) % pitch != 0)
            throw std::invalid_argument("quantise: " + std::to_string(held) + " bytes are not " +
                                        std::to_string(columns) + " columns, " + std::to_string(pitch) + " apart");
        held = line * columns;
    }
    check_dense("quantise", held, code, rows, columns);
    bool fits = block_rows != 0 && block_columns != 0 && !(packed && columns % 8 != 0);
    if (fits && (kind == QUANT_INT4 || kind == QUANT_E2M1)) fits = block_rows == 1 && block_columns % 8 == 0 && columns % block_columns == 0;
    if (fits && turned) fits = block_columns == 1 && block_rows % 8 == 0 && rows % 8 == 0;
    if (!fits)
        throw std::invalid_argument("quantise: blocks of " + std::to_string(block_rows) + " x " +
                                    std::to_string(block_columns));
    const size_t blocks = ((rows - 1) / block_rows + 1) * ((columns - 1) / block_columns + 1);
    if (o.nbytes() != rows * columns / (packed ? 2 : 1) || s.count<float>("scales") != blocks || t.count<double>("sums") != 5)
        throw std::invalid_argument("quantise: out, scales or sums have another size");
    Quant q{d.data(), rows, columns, pitch, block_rows, block_columns, static_cast<Dtype>(code), static_cast<QuantKind>(kind),
            reciprocal, half, power, reach, floor, lowest, nullptr, o.data(), s.items<float>(), nullptr, t.items<double>()};
    std::optional<Held> a, z;
    if (power ? !reciprocal || half : kind == QUANT_E2M1) throw std::invalid_argument("quantise: floats of four bits have powers of two");
    if (!amax.is_none() && packed) throw std::invalid_argument("quantise: four bits take no amax");
    if (!amax.is_none()) {
        a.emplace(amax);
        if (a->count<float>("amax") != rows || block_rows != 1 || block_columns != columns)
            throw std::invalid_argument("quantise: amax is one a row, and goes with blocks of whole rows");
        q.amax = a->items<float>();
    }
    if (!zeros.is_none()) {
        z.emplace(zeros, true);
        if (z->nbytes() != blocks || !packed || kind == QUANT_E2M1 || q.amax != nullptr)
            throw std::invalid_argument("quantise: zeros are one a block of four bits");
        q.zeros = z->items<int8_t>();
    }
    py::gil_scoped_release free;
    return kernels(isa).quantise(q);
}

void py_dequantise(const py::object& values, int kind, size_t rows, size_t columns, const py::object& scales, const py::object& zeros,
                   const py::object& row, size_t group, size_t first, float offset, int code, const py::object& out, int isa) {
    Held v(values), s(scales), r(row), o(out, true);
    if (kind < 0 || kind >= DEQUANT_KINDS) throw std::invalid_argument("dequantise: no kind " + std::to_string(kind));
    check_dense("dequantise", o.nbytes(), code, rows, columns);
    const bool four = (kind >= DEQUANT_INT4 && kind <= DEQUANT_INT4_DOWN) || kind == DEQUANT_E2M1;
    const size_t tall = kind == DEQUANT_INT4_DOWN ? 8 : kind == DEQUANT_INT8_DOWN ? 4 : 1;
    const size_t wide = kind == DEQUANT_INT4 || kind == DEQUANT_INT4_AWQ ? 8 : kind == DEQUANT_E2M1 ? 2 : 1;
    if (rows % tall != 0 || columns % wide != 0 || v.nbytes() != rows * columns / (four ? 2 : 1))
        throw std::invalid_argument("dequantise: " + std::to_string(v.nbytes()) + " bytes are not " + std::to_string(rows) + " x " +
                                    std::to_string(columns) + " values");
    const size_t groups = group == 0 ? 1 : (first + columns - 1) / group + 1, held = s.count<float>("scales");
    if (r.count<int32_t>("row") != rows || first > columns + group || held % groups != 0)
        throw std::invalid_argument("dequantise: scales or rows of another size");
    for (size_t i = 0; i < rows; ++i)
        if (r.items<int32_t>()[i] < 0 || static_cast<size_t>(r.items<int32_t>()[i]) >= held / groups)
            throw std::invalid_argument("dequantise: a row of no scales");
    Dequant q{v.data(), rows, columns, static_cast<DequantKind>(kind), static_cast<Dtype>(code), s.items<float>(), nullptr,
              r.items<int32_t>(), groups, group, first, offset, o.data()};
    std::optional<Held> z;
    if (!zeros.is_none()) {
        z.emplace(zeros);
        if (z->count<float>("zeros") != held) throw std::invalid_argument("dequantise: zeros are as many as scales");
        q.zeros = z->items<float>();
    }
    py::gil_scoped_release free;
    kernels(isa).dequantise(q);
}

void py_add_low_rank(const py::object& base, const py::object& left, const py::object& right, size_t rows, size_t rank,
                     size_t columns, double scale, int isa) {
    Held b(base, true), l(left), r(right);
    check_dense("add_low_rank", b.nbytes(), FLOAT32, rows, columns);
    const size_t beside = l.count<double>("left"), below = r.count<double>("right");
    if (beside / rows != rank || beside % rows != 0 || below / columns != rank || below % columns != 0)
        throw std::invalid_argument("add_low_rank: " + std::to_string(beside) + " and " + std::to_string(below) +
                                    " values are not " + std::to_string(rows) + " x " + std::to_string(rank) + " and " +
                                    std::to_string(rank) + " x " + std::to_string(columns));
    const LowRank q{b.items<float>(), l.items<double>(), r.items<double>(), rows, rank, columns, scale};
    py::gil_scoped_release free;
    kernels(isa).add_low_rank(q);
}

void py_row_amax(const py::object& dense, int code, size_t rows, size_t columns, const py::object& out, int isa) {
    Held d(dense), o(out, true);
    check_dense("row_amax", d.nbytes(), code, rows, columns);
    if (o.count<float>("out") != rows) throw std::invalid_argument("row_amax: out has another size");
    py::gil_scoped_release free;
    kernels(isa).row_amax(o.items<float>(), d.data(), rows, columns, static_cast<Dtype>(code));
}

// ---- the GPU ----

void py_run_tiles_on_host(const py::object& rows, const py::object& owner, const py::object& sources, const py::object& destinations,
                          uint32_t shuffle) {
    Held r(rows), o(owner), s(sources), d(destinations);
    const size_t count = r.count<Copy>("rows"), tiles = o.count<uint32_t>("owner");
    const size_t from = s.count<uint64_t>("sources"), to = d.count<uint64_t>("destinations");
    for (size_t i = 0; i < tiles; ++i)
        if (o.items<uint32_t>()[i] >= count) throw std::invalid_argument("run_tiles_on_host: a tile of no row");
    for (size_t i = 0; i < count; ++i) {
        const Copy& c = r.items<Copy>()[i];
        if ((c.src_buffer != ZERO_BUFFER && c.src_buffer >= from) || c.dst_buffer >= to)
            throw std::invalid_argument("run_tiles_on_host: a row of no buffer");
    }
    const TableAt table{reinterpret_cast<uint64_t>(r.data()), reinterpret_cast<uint64_t>(o.data()), reinterpret_cast<uint64_t>(s.data()),
                        reinterpret_cast<uint64_t>(d.data())};
    py::gil_scoped_release free;
    run_tiles_on_host(table, tiles, shuffle);
}

void py_tiles_of_rows(const py::object& rows, const py::object& out) {
    Held r(rows), result(out, true);
    const size_t n = r.count<Copy>("rows");
    if (result.count<uint64_t>("out") != n) throw std::invalid_argument("tiles_of_rows: rows and out differ in length");
    for (size_t i = 0; i < n; ++i) result.items<uint64_t>()[i] = tiles_of_row(r.items<Copy>()[i]);
}

void py_run_digests_on_host(const py::object& leaves, const py::object& out) {
    Held l(leaves), result(out, true);
    const size_t n = result.count<uint64_t>("out");
    if (l.count<uint64_t>("leaves") != 2 * n) throw std::invalid_argument("run_digests_on_host: two numbers for each result");
    py::gil_scoped_release free;
    run_digests_on_host(reinterpret_cast<uint64_t>(l.data()), n, reinterpret_cast<uint64_t>(result.data()));
}

void py_run_quantise_on_host(const py::object& rows, const py::object& owner, uint32_t shuffle) {
    Held r(rows), o(owner);
    const size_t count = r.count<QuantRows>("rows"), tiles = o.count<uint32_t>("owner");
    for (size_t i = 0; i < tiles; ++i)
        if (o.items<uint32_t>()[i] >= count) throw std::invalid_argument("run_quantise_on_host: a tile of no row");
    py::gil_scoped_release free;
    run_quantise_on_host(reinterpret_cast<uint64_t>(r.data()), reinterpret_cast<uint64_t>(o.data()), tiles, shuffle);
}

void py_tiles_of_quant_rows(const py::object& rows, const py::object& out) {
    Held r(rows), result(out, true);
    const size_t n = r.count<QuantRows>("rows");
    if (result.count<uint64_t>("out") != n) throw std::invalid_argument("tiles_of_quant_rows: rows and out differ in length");
    for (size_t i = 0; i < n; ++i) result.items<uint64_t>()[i] = tiles_of_quant_rows(r.items<QuantRows>()[i]);
}

py::tuple py_bank_conflicts(int s, int d) {
    const Conflicts worst = bank_conflicts(s, d);
    return py::make_tuple(worst.write, worst.read);
}

#if defined(FASTCKPT_CUDA)
void py_launch_tiles(uint64_t rows, uint64_t owner, uint64_t sources, uint64_t destinations, int path, uint64_t first, uint64_t count,
                     uint64_t stream) {
    py::gil_scoped_release free;
    launch_tiles({rows, owner, sources, destinations}, path, first, count, stream);
}

void py_launch_digests(uint64_t leaves, uint64_t count, uint64_t out, uint64_t stream) {
    py::gil_scoped_release free;
    launch_digests(leaves, count, out, stream);
}

void py_launch_quantise(uint64_t rows, uint64_t owner, uint64_t first, uint64_t count, uint64_t stream) {
    py::gil_scoped_release free;
    launch_quantise(rows, owner, first, count, stream);
}

py::dict py_device_state() {
    const DeviceState s = device_state();
    py::dict facts;
    facts["devices"] = s.devices;
    facts["driver"] = s.driver;
    facts["runtime"] = s.runtime;
    facts["error"] = s.error;
    facts["why"] = s.why;
    return facts;
}

py::list py_kernel_facts() {
    py::list out;
    for (const KernelFacts& k : kernel_facts()) {
        py::dict facts;
        facts["name"] = k.name;
        facts["registers"] = k.registers;
        facts["local_bytes"] = k.local_bytes;
        facts["shared_bytes"] = k.shared_bytes;
        facts["threads"] = k.threads;
        facts["blocks_per_multiprocessor"] = k.blocks_per_multiprocessor;
        out.append(facts);
    }
    return out;
}
#endif

py::list py_isas() {
    py::list names;
    for (int i = 0; i < ISAS; ++i)
        if (has_isa(i)) names.append(ISA_NAMES[i]);
    return names;
}

py::list py_fields() {
    py::list fields;
    for (const Field& f : FIELDS) fields.append(py::make_tuple(f.name, f.offset, f.size));
    return fields;
}

// Names of files are bytes; Python spells what is not in its encoding with surrogates, both ways.
py::object spelled(const std::string& name) {
    return py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefaultAndSize(name.data(), static_cast<Py_ssize_t>(name.size())));
}

std::string bytes_of(const py::object& path) {
    PyObject* found = nullptr;
    if (!PyUnicode_FSConverter(path.ptr(), &found)) throw py::error_already_set();
    return py::reinterpret_steal<py::bytes>(found);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The compiled part of fastckpt: copies, mapped files, digests.";
    py::register_exception_translator([](std::exception_ptr error) {
        try {
            if (error) std::rethrow_exception(error);
        } catch (const BrokenFile& e) {
            py::set_error(py::module_::import("fastckpt.errors").attr("SourceError"), spelled(e.what()));
        } catch (const NoRoom& e) {
            py::set_error(py::module_::import("fastckpt.errors").attr("WriteError"), spelled(e.what()));
        }
    });

    m.attr("version") = FASTCKPT_VERSION;
    m.attr("compiler") = __VERSION__;
#if defined(FASTCKPT_CUDA)
    m.attr("built_with_cuda") = true;
    m.attr("cuda_archs") = CUDA_ARCHITECTURES;
    m.def("device_state", py_device_state, "What CUDA says of this machine; asks the driver.");
    m.def("kernel_facts", py_kernel_facts, "Registers, local and shared memory, and occupancy on the current device.");
    m.def("launch_tiles", py_launch_tiles, py::arg("rows"), py::arg("owner"), py::arg("sources"), py::arg("destinations"),
          py::arg("path"), py::arg("first"), py::arg("count"), py::arg("stream"));
    m.def("launch_digests", py_launch_digests, py::arg("leaves"), py::arg("count"), py::arg("out"), py::arg("stream"));
    m.def("launch_quantise", py_launch_quantise, py::arg("rows"), py::arg("owner"), py::arg("first"), py::arg("count"),
          py::arg("stream"));
#else
    m.attr("built_with_cuda") = false;
#endif
    m.def("run_tiles_on_host", py_run_tiles_on_host, py::arg("rows"), py::arg("owner"), py::arg("sources"),
          py::arg("destinations"), py::arg("shuffle") = 0);
    m.def("run_digests_on_host", py_run_digests_on_host, py::arg("leaves"), py::arg("out"));
    m.def("run_quantise_on_host", py_run_quantise_on_host, py::arg("rows"), py::arg("owner"), py::arg("shuffle") = 0);
    m.def("tiles_of_quant_rows", py_tiles_of_quant_rows, py::arg("rows"), py::arg("out"));
    m.def("tiles_of_rows", py_tiles_of_rows, py::arg("rows"), py::arg("out"));
    m.def("bank_conflicts", py_bank_conflicts, py::arg("src_size"), py::arg("dst_size"));
    m.attr("copy_bytes") = sizeof(Copy);
    m.attr("quant_rows_bytes") = sizeof(QuantRows);
    m.def("fields", py_fields, "The fields of struct Copy: (name, offset, size) in bytes.");
    m.def("isas", py_isas, "The instruction sets that can run here; the position is the number `copy_rows` takes.");

    m.def("copy_rows", py_copy_rows, py::arg("rows"), py::arg("sources"), py::arg("destinations"), py::arg("threads") = 1,
          py::arg("isa") = -1, py::arg("recent") = py::none());
    py::class_<Recent>(m, "Recent")
        .def(py::init(&make_recent), py::arg("addresses"), py::arg("mapped"), py::arg("limit"));
    m.def("digest64", py_digest64, py::arg("buffer"));
    m.def("leaf_digests", py_leaf_digests, py::arg("buffer"), py::arg("offsets"), py::arg("sizes"), py::arg("out"));
    m.def("crc32", py_crc32, py::arg("buffer"), py::arg("value") = 0);
    m.def("crc32_combine", crc32_combine, py::arg("a"), py::arg("b"), py::arg("nbytes_b"));
    m.def("nonfinite", py_nonfinite, py::arg("buffer"), py::arg("dtype_code"));

    m.def("quantise", py_quantise, py::arg("dense"), py::arg("dtype_code"), py::arg("rows"), py::arg("columns"),
          py::arg("pitch"), py::arg("block_rows"), py::arg("block_columns"), py::arg("reach"), py::arg("floor"), py::arg("lowest"),
          py::arg("reciprocal"), py::arg("half"), py::arg("power"), py::arg("kind"), py::arg("amax"), py::arg("out"), py::arg("scales"),
          py::arg("zeros"), py::arg("sums"), py::arg("isa") = -1);
    m.def("dequantise", py_dequantise, py::arg("values"), py::arg("kind"), py::arg("rows"), py::arg("columns"), py::arg("scales"),
          py::arg("zeros"), py::arg("row"), py::arg("group"), py::arg("first"), py::arg("offset"), py::arg("dtype_code"), py::arg("out"),
          py::arg("isa") = -1);
    m.def("add_low_rank", py_add_low_rank, py::arg("base"), py::arg("left"), py::arg("right"), py::arg("rows"), py::arg("rank"),
          py::arg("columns"), py::arg("scale"), py::arg("isa") = -1);
    m.def("row_amax", py_row_amax, py::arg("dense"), py::arg("dtype_code"), py::arg("rows"), py::arg("columns"), py::arg("out"),
          py::arg("isa") = -1);

    m.def("faults", faults, "Pages of mapped files that were gone when read, in this process so far.");
    py::class_<Mapping>(m, "Mapping")
        .def(py::init([](const py::object& path, uint64_t nbytes) { return std::make_unique<Mapping>(bytes_of(path), nbytes); }),
             py::arg("path"), py::arg("nbytes"))
        .def_property_readonly("path", [](const Mapping& m) { return spelled(m.path()); })
        .def_property_readonly("address", &Mapping::address)
        .def_property_readonly("nbytes", &Mapping::nbytes)
        .def_property_readonly("faulted", &Mapping::faulted)
        .def("close", &Mapping::close, py::call_guard<py::gil_scoped_release>());
}
