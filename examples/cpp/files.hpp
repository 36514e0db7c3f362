// What files hold: bytes and their sha256, JSON, tensors.
#pragma once

#include <openssl/evp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <openvino/openvino.hpp>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace hhdeploy {

using Json = nlohmann::json;
namespace fs = std::filesystem;

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline std::string read_file(const fs::path& path) {
    std::ifstream file;
    if (fs::is_regular_file(path)) file.open(path, std::ios::binary);  // a pipe would be waited for
    if (!file.is_open()) throw Error(path.string() + " cannot be read.");
    return {std::istreambuf_iterator<char>(file), {}};
}

inline std::string sha256(const std::string& bytes) {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned length = 0;
    if (!EVP_Digest(bytes.data(), bytes.size(), digest, &length, EVP_sha256(), nullptr))
        throw Error("OpenSSL could not compute a sha256.");
    std::string text;
    for (unsigned i = 0; i < length; ++i)
        for (int digit : {digest[i] >> 4, digest[i] & 15}) text += "0123456789abcdef"[digit];
    return text;
}

// JSON of a file. By itself a parser takes the last of a key's values, and says nothing of the others; this one also
// takes a mark of UTF-8 in front, and all that follows a zero byte.
inline Json parse(const std::string& text, const std::string& file) {
    std::vector<std::set<std::string>> open;
    if (text.rfind("\xEF\xBB\xBF", 0) == 0 || text.find('\0') != std::string::npos)
        throw Error(file + ": expected JSON in UTF-8, found a byte order mark or a zero byte.");
    try {
        return Json::parse(text, [&](int level, Json::parse_event_t event, Json& parsed) {
            const bool opens = event == Json::parse_event_t::object_start || event == Json::parse_event_t::array_start;
            if (opens && level >= 100) throw Error(file + ": expected JSON of at most 100 levels, found more.");
            if (event == Json::parse_event_t::object_start) open.emplace_back();
            if (event == Json::parse_event_t::object_end) open.pop_back();
            if (event == Json::parse_event_t::key && !open.back().insert(parsed.get<std::string>()).second)
                throw Error(file + ": " + parsed.dump() + " is there twice.");
            return true;
        });
    } catch (const Json::exception& error) {
        const std::string said = error.what();  // with what was read last, which may be no text
        throw Error(file + ": expected JSON: " + said.substr(0, said.find("; last read")) + ".");
    }
}

// Throws where a manifest's value is not what it can be, naming it.
inline void expect(bool fits, const std::string& key, const std::string& expected, const Json& found) {
    if (!fits) throw Error(key + ": expected " + expected + ", found " + found.dump() + ".");
}

// Zero may be written -0, which is no unsigned number.
inline bool is_count(const Json& value) { return value.is_number_integer() && value >= 0 && value <= INT32_MAX; }
inline bool is_size(const Json& value) { return value.is_number_unsigned(); }
inline bool is_text(const Json& value) { return value.is_string(); }

inline bool are(const Json& values, bool (*fits)(const Json&)) {
    return values.is_array() && std::all_of(values.begin(), values.end(), fits);
}

// The float32 tensor of a safetensors file. The header is JSON behind its length in 8 bytes; then one tensor follows the
// other, and nothing is between or behind them.
inline ov::Tensor float_tensor(const std::string& bytes, const std::string& name, const std::string& file) {
    std::uint64_t length = 0, last = 0;
    if (bytes.size() < sizeof length) throw Error(file + " is no safetensors file: it is too short.");
    std::memcpy(&length, bytes.data(), sizeof length);
    const std::uint64_t rest = bytes.size() - sizeof length;
    if (length > rest) throw Error(file + " is no safetensors file: its header is longer than it.");
    const Json header = parse(bytes.substr(sizeof length, length), file);
    expect(header.is_object(), file, "a header of tensors", header);
    std::set<std::pair<std::uint64_t, std::uint64_t>> places;
    for (const auto& [key, entry] : header.items()) {
        const bool metadata = key == "__metadata__";
        const Json offsets = entry.is_object() && !metadata ? entry.value("data_offsets", Json()) : Json();
        if (metadata && entry.is_object() && std::all_of(entry.begin(), entry.end(), is_text)) continue;
        expect(are(offsets, is_size) && offsets.size() == 2, file + ": " + key, "data_offsets", entry);
        places.emplace(offsets[0], offsets[1]);
    }
    for (const auto& [begin, end] : places) {
        if (begin != last || end < begin) throw Error(file + ": a hole between its tensors: it is damaged.");
        last = end;
    }
    if (last != rest - length) throw Error(file + ": expected its end behind its tensors: it is damaged.");
    if (!header.contains(name)) throw Error(file + " has no tensor " + name + ".");
    const Json& entry = header.at(name);
    expect(are(entry.value("shape", Json()), is_size), file + ": " + name, "a shape", entry);
    const auto shape = entry.at("shape").get<ov::Shape>();
    const std::uint64_t begin = entry.at("data_offsets")[0], end = entry.at("data_offsets")[1];
    const bool fits = end - begin == ov::shape_size(shape) * sizeof(float);
    if (entry.value("dtype", Json()) != "F32" || !fits)
        throw Error(file + ": " + name + ": expected float32 of its shape.");
    ov::Tensor tensor(ov::element::f32, shape);
    std::memcpy(tensor.data(), bytes.data() + sizeof length + length + begin, end - begin);
    return tensor;
}

}  // namespace hhdeploy
