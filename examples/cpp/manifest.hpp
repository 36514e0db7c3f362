// hhdeploy.json: whether it can be what it says. The checks are Python's; docs/formats.md describes the file.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "files.hpp"

namespace hhdeploy {

// What stands under some keys of an object.
struct Kind {
    const char* key;
    std::function<bool(const Json&)> fits;
    const char* expected;
    bool needed = true;
};

inline void check_kinds(const Json& owner, const std::string& where, const std::vector<Kind>& kinds) {
    for (const Kind& kind : kinds) {
        const bool there = owner.contains(kind.key);
        const bool fits = there ? kind.fits(owner.at(kind.key)) : !kind.needed;
        expect(fits, where + "." + kind.key, kind.expected, there ? owner.at(kind.key) : Json());
    }
}

inline bool is_object(const Json& value) { return value.is_object(); }
inline bool is_list(const Json& value) { return value.is_array(); }
inline bool is_finite(const Json& value) { return value.is_number(); }  // no other number is parsed
inline bool are_texts(const Json& value) { return are(value, is_text); }
inline bool is_range(const Json& value) { return are(value, is_count) && value.size() == 3; }
inline bool is_licence(const Json& value) { return value.is_null() || is_text(value) || are_texts(value); }
inline bool is_digest(const Json& value) {
    static const std::regex digest("[0-9a-f]{64}");
    return is_text(value) && std::regex_match(value.get_ref<const std::string&>(), digest);
}
inline std::function<bool(const Json&)> or_null(bool (*fits)(const Json&)) {
    return [fits](const Json& value) { return value.is_null() || fits(value); };
}
inline std::function<bool(const Json&)> one_of(const Json& known) {
    return [known](const Json& value) { return std::find(known.begin(), known.end(), value) != known.end(); };
}
inline bool is_loss(const Json& value) {  // by an adapter's compression
    return value.is_null() || (value.is_object() && value.size() == 3 && is_count(value.value("rank", Json())) &&
                               is_finite(value.value("max_range_error", Json())) && is_text(value.value("worst_site", Json())));
}

inline const Json PRECISIONS = {"float32", "float16", "bfloat16", "int8", "fp8", "int8-weights"};
inline const Json PROBLEM_TYPES = {nullptr, "single_label_classification", "multi_label_classification", "regression"};

// A file of a bundle, and nothing beside it.
inline bool is_inside(const std::string& name) {
    static const std::regex outside(R"((^|/)(\.{0,2})(/|$)|^\.|\\)");
    return !std::regex_search(name, outside) && name.find('\0') == std::string::npos && name != "hhdeploy.json" &&
           name != "model.sig";
}

inline void check_class_names(const Json& owner, const std::string& where) {
    const Json names = owner.value("class_names", Json()), classes = owner.at("classes");
    expect(names.is_null() || are_texts(names), where + ".class_names", "a list of names, or null", names);
    expect(names.empty() || names.size() == classes, where + ".class_names", classes.dump() + " names", names.size());
}

inline void check_backbone(const Json& backbone, const std::string& where) {
    static const std::vector<Kind> kinds = {
        {"model", is_text, "a text"}, {"args", is_object, "an object"}, {"sha256", is_text, "a text"},
        {"signs_sha256", is_text, "a text", false}, {"buffers_sha256", is_text, "a text", false},
        {"classifier", is_text, "a module's path"}, {"dim", is_count, "a number"},
        {"classes", is_count, "a number of classes"}, {"license", is_licence, "a name, a list of them, or null", false},
        {"problem_type", one_of(PROBLEM_TYPES), "what numbers may mean", false}};
    check_kinds(backbone, where, kinds);
    check_class_names(backbone, where);
}

// Only Python loads what they are of.
inline void check_engines(const Json& engines, const std::string& where) {
    static const std::vector<Kind> kinds = {
        {"file", is_text, "a text"}, {"backend", one_of({"tensorrt", "tensorrt-rtx"}), "tensorrt or tensorrt-rtx"},
        {"version", is_text, "a text"}, {"precision", one_of(PRECISIONS), "a precision"},
        {"architectures", are_texts, "a list of names"}, {"gpu", or_null(is_text), "a text, or null"},
        {"batch", is_range, "three numbers"}, {"slots", or_null(is_range), "three numbers, or null"},
        {"bank_sha256", or_null(is_digest), "64 hex digits, or null"}, {"graph_sha256", is_text, "a text"},
        {"optimization_level", or_null(is_count), "a number, or null"}, {"build_seconds", is_finite, "a finite number"},
        {"bytes", is_finite, "a finite number"}};
    expect(engines.is_array(), where, "a list", engines);
    for (size_t i = 0; i < engines.size(); ++i) {
        const std::string place = where + "[" + std::to_string(i) + "]";
        expect(engines[i].is_object(), place, "an object", engines[i]);
        check_kinds(engines[i], place, kinds);
        expect(engines[i].size() == kinds.size(), place, "keys of an engine alone", engines[i]);
    }
}

// A row's parts and its size are told twice: by its branches and classes, too.
inline void check_row(const Json& row, const std::string& where) {
    static const std::vector<Kind> kinds = {{"classes", is_count, "a number"}, {"dim", is_count, "a number"},
                                            {"backbone_head", [](const Json& x) { return x.is_boolean(); }, "true or false"},
                                            {"branches", is_list, "a list"}};
    static const std::vector<Kind> of_branches = {
        {"linear", is_text, "a text"}, {"form", is_text, "a text"}, {"sites", are_texts, "a list of names"},
        {"out", is_count, "a number"}, {"in", is_count, "a number"}, {"rank", is_count, "a number"},
        {"parts", or_null(are_texts), "a list of names", false}};
    expect(row.is_object(), where, "an object, or null", row);
    check_kinds(row, where, kinds);
    Json parts = Json::array();
    std::uint64_t size = 0;
    const auto add = [&](const std::string& part, const std::vector<std::uint64_t>& shape) {
        parts.push_back({{"part", part}, {"offset", size}, {"shape", shape}});
        std::uint64_t values = 1;
        for (std::uint64_t each : shape) values *= each;
        size += values;
    };
    for (size_t i = 0; i < row.at("branches").size(); ++i) {
        const Json& branch = row.at("branches")[i];
        const std::string place = where + ".branches[" + std::to_string(i) + "]";
        expect(branch.is_object(), place, "an object", branch);
        check_kinds(branch, place, of_branches);
        const std::uint64_t n = branch.at("sites").size(), out = branch.at("out"), in = branch.at("in"), rank = branch.at("rank");
        const std::string name = branch.at("linear").get<std::string>() + "/" + branch.at("form").get<std::string>() + "/";
        add(name + "diag", {n, std::min(out, in)});
        add(name + "right", {n, rank, in});
        add(name + "left_t", {n, rank, out});
        const Json extras = branch.value("parts", Json());
        const auto has = [&](const char* part) { return std::find(extras.begin(), extras.end(), part) != extras.end(); };
        if (has("s_in")) add(name + "s_in", {1, in});
        for (const char* part : {"s_out", "db"})
            if (has(part)) add(name + part, {n, out});
    }
    const std::uint64_t classes = row.at("classes"), dim = row.at("dim");
    if (classes) {
        add("head.weight", {classes, dim});
        add("head.bias", {classes});
        add("head.own", {1});
    }
    const Json told = row.value("parts", Json()), whole = row.value("size", Json());
    expect(told == parts, where + ".parts", "those of row.branches, in their order", told);
    expect(whole == size, where + ".size", std::to_string(size) + ", of its parts", whole);
}

// How pictures become images. The numbers for its graph are told twice: by what the transform itself is, too, which
// Python goes by.
inline void check_transform(const Json& owner, const std::string& where, const Json& manifest) {
    const std::string own = where + ".preprocess", graph = where + ".preprocess_graph";
    const Json given = owner.value("preprocess", Json());
    expect(given.is_object(), own, "an object", given);
    Json transform = {{"interpolation", "bicubic"}, {"crop_pct", 0.875}, {"crop_mode", "center"}, {"exif", false}};
    static const std::set<std::string> more = {"input_size", "mean", "std"};
    for (const auto& each : given.items())
        expect(transform.contains(each.key()) || more.count(each.key()), own, "keys of a transform", each.key());
    transform.update(given);
    const Json size = transform.value("input_size", Json());
    const bool sized = size.is_array() && size.size() == 3 && std::all_of(size.begin(), size.end(), is_count);
    expect(sized && size[1] > 0 && size[2] > 0, own + ".input_size", "[channels, H, W]", size);
    const Json wanted = manifest.at("backbone").at("preprocess").value("input_size", Json());
    expect(size == wanted, own + ".input_size", "the backbone's " + wanted.dump(), size);
    for (const char* key : {"mean", "std"}) {
        const Json values = transform.value(key, Json());
        const bool each = values.is_array() && values.size() == size[0];
        const auto fits = key == std::string("std") ? [](const Json& value) { return value.is_number() && value > 0; }
                                                    : [](const Json& value) { return value.is_number(); };
        expect(each && are(values, fits), own + "." + key, "a number for each channel, of std more than 0", values);
    }
    const Json share = transform.at("crop_pct");
    expect(share.is_number() && share > 0 && share <= 2, own + ".crop_pct", "a number in (0, 2]", share);
    expect(transform.at("exif").is_boolean(), own + ".exif", "true or false", transform.at("exif"));
    static const Json filters = {"nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"};
    static const Json modes = {"center", "squash", "border"};
    for (const auto& [key, known] : {std::pair("interpolation", filters), std::pair("crop_mode", modes)}) {
        const Json name = transform.at(key);
        expect(std::find(known.begin(), known.end(), name) != known.end(), own + "." + key, known.dump(), name);
    }
    const Json told = owner.value("preprocess_graph", Json());
    if (told.is_null()) return;
    const std::string mode = transform.at("crop_mode"), filter = transform.at("interpolation");
    const Json file = told.is_object() ? told.value("file", Json()) : Json();
    const std::regex role("preprocess\\." + mode + "\\." + filter + R"((\.[0-9a-f]{8})?\.onnx)");
    expect(file.is_string() && std::regex_match(file.get<std::string>(), role), graph + ".file",
           "preprocess." + mode + "." + filter + ".onnx, as its preprocess has it", file);
    Json resize, fill;
    for (const size_t side : {1, 2}) resize.push_back(int64_t(size[side].get<double>() / share.get<double>()));
    for (const Json& level : transform.at("mean"))
        fill.push_back(mode == "border" ? std::lrint(255 * level.get<double>()) : 0);
    const std::map<std::string, std::pair<std::string, Json>> expected = {
        {"mean", {"float32", transform.at("mean")}}, {"std", {"float32", transform.at("std")}},
        {"resize", {"int64", resize}}, {"crop", {"int64", {size[1], size[2]}}}, {"fill", {"float32", fill}}};
    const Json inputs = told.value("inputs", Json());
    expect(inputs.is_object() && inputs.size() == expected.size(), graph + ".inputs", "those of its preprocess", inputs);
    for (const auto& [name, right] : expected) {
        const Json found = inputs.value(name, Json());
        const Json as = {{"dtype", right.first}, {"value", right.second}};
        expect(found == as, graph + ".inputs." + name, as.dump() + ", as its preprocess has it", found);
    }
}

// What the answers depend on: wrong, they would be of other classes, or another adapter's.
inline void check_entry(const Json& entry, const std::string& where, const Json& manifest) {
    expect(entry.is_object(), where, "an object", entry);
    const auto value = [&](const char* key) { return entry.value(key, Json()); };
    const Json name = value("name"), row = value("row"), classes = value("classes");
    expect(name.is_string(), where + ".name", "a name", name);
    const bool folder = is_inside(name) && name.get_ref<const std::string&>().find('/') == std::string::npos;
    expect(folder, where + ".name", "a name that a folder can have", name);
    expect(name != "backbone", where + ".name", "another name than the bare model's", name);
    expect(value("verified").is_boolean(), where + ".verified", "true or false", value("verified"));
    const Json strength = entry.value("strength", Json(1));
    expect(strength.is_number(), where + ".strength", "a finite number", strength);
    const bool placed = is_count(row) && row > 0;
    const bool none = entry.contains("row") && row.is_null() && manifest.at("kind") == "folded";
    expect(placed || none, where + ".row", "1 or more", row);
    expect(is_count(classes), where + ".classes", "a number of classes", classes);
    const Json& most = manifest.at("classes");
    expect(most == 0 || classes <= most, where + ".classes", "at most the graph's " + most.dump(), classes);
    expect(entry.contains("class_names"), where + ".class_names", "a list of names, or null", Json());
    check_class_names(entry, where);
    const Json kind = value("problem_type");
    expect(one_of(PROBLEM_TYPES)(kind), where + ".problem_type", PROBLEM_TYPES.dump(), kind);
    check_kinds(entry, where, {{"license", is_licence, "a licence's name, a list of them, or null", false},
                               {"compressed", is_loss, "an object of rank, max_range_error and worst_site, or null", false}});
}

// What the graph takes and gives is told twice: by what the bundle is, too.
inline void check_tensors(const Json& manifest, const std::string& in) {
    const Json tensors = manifest.value("tensors", Json()), row = manifest.at("row"), classes = manifest.at("classes");
    expect(tensors.is_object(), in + "tensors", "an object", tensors);
    const auto told = [&](const char* name) { return tensors.value(name, Json()); };
    const Json logits = classes == 0 ? Json() : Json({"batch", classes});
    expect(told("logits") == logits, in + "classes", "those of tensors.logits, " + told("logits").dump(), classes);
    Json images = manifest.at("backbone").at("preprocess").at("input_size");
    images.insert(images.begin(), "batch");
    const bool banked = !row.is_null() && !manifest.at("bank_as_constant");
    const Json ids = row.is_null() ? Json() : Json({"batch"}), slots = {"slots", row.is_null() ? Json() : row.value("size", Json())};
    for (const auto& [name, shape] : {std::pair("images", images), std::pair("adapter_ids", ids),
                                      std::pair("adapter_bank", banked ? slots : Json())})
        expect(told(name) == shape, in + "tensors." + name, shape.dump() + ", as the rest has it", told(name));
}

// Every file is the bundle's, and has a digest and a role of its own (of two banks, say, that a merge left, one would be taken), every graph
// a precision that there is.
inline void check_files(const Json& files, const Json& graphs, const std::string& in) {
    static const std::regex digits(R"(\.[0-9a-f]{8}(?=\.(safetensors|json|onnx|onnx\.data|engine)$))");
    std::map<std::string, std::string> roles;
    for (const auto& [name, found] : files.items()) {
        if (!is_inside(name)) throw Error(in + "files: " + Json(name).dump() + ": expected a path inside of the bundle.");
        expect(is_digest(found), in + "files." + name, "64 hex digits", found);
        const auto [other, alone] = roles.emplace(std::regex_replace(name, digits, ""), name);
        if (!alone) throw Error(in + "files: expected one " + other->first + ", found " + other->second + " and " + name + ".");
    }
    for (const auto& [precision, name] : graphs.items()) {
        if (!one_of(PRECISIONS)(precision))
            throw Error(in + "graph " + precision + ": expected one of " + PRECISIONS.dump() + ".");
        expect(name.is_string() && files.contains(name.get<std::string>()), in + "graphs." + precision,
               "the name of one of its files", name);
    }
}

// The columns of the graph's logits are those of the heads that answer: of the only one in a folded bundle, else of the
// widest. The softmax over a part of them would be wrong.
inline void check_classes(const Json& manifest, const std::string& in) {
    const Json &classes = manifest.at("classes"), &row = manifest.at("row"), &own = manifest.at("backbone").at("classes");
    if (classes == 0) return;
    if (row.is_null()) {
        for (const Json& entry : manifest.at("adapters"))
            expect(entry.at("classes") == classes, in + "adapters[0].classes", "the graph's " + classes.dump(),
                   entry.at("classes"));
        return;
    }
    const Json backbone = row.at("backbone_head") == true ? own : Json(0u), widest = std::max(row.at("classes"), backbone);
    expect(classes == widest, in + "classes", widest.dump() + ", the most of row.classes (" + row.at("classes").dump() +
           ") and of the backbone's own classifier (" + backbone.dump() + ")", classes);
}

inline void check_manifest(const Json& manifest, const std::string& file) {
    const std::string in = file + ": ";
    expect(manifest.is_object(), file, "an object", manifest.type_name());
    const auto value = [&](const char* key) { return manifest.value(key, Json()); };
    const Json schema = value("schema_version"), kind = value("kind"), classes = value("classes");
    expect(is_count(schema) && schema <= 2 && schema > 0, in + "schema_version", "1 or 2", schema);
    expect(manifest.contains("row"), in + "row", "an object, or null", Json());
    const char* const fitting = value("row").is_null() ? "folded" : "branches";
    expect(kind == fitting, in + "kind", std::string(fitting) + ", as its row has it", kind);
    expect(is_count(classes), in + "classes", "a number of classes", classes);
    const Json constant = value("bank_as_constant"), row = value("row");
    expect(constant.is_boolean(), in + "bank_as_constant", "true or false", constant);
    if (!row.is_null()) check_row(row, in + "row");
    for (const char* key : {"backbone", "graphs", "files", "versions"})
        expect(value(key).is_object(), in + key, "an object", value(key));
    expect(value("adapters").is_array(), in + "adapters", "a list", value("adapters"));
    check_engines(value("engines"), in + "engines");
    check_backbone(value("backbone"), in + "backbone");
    check_transform(manifest.at("backbone"), in + "backbone", manifest);
    std::set<Json> names, rows;
    size_t number = 0;
    for (const Json& entry : manifest.at("adapters")) {
        const std::string where = in + "adapters[" + std::to_string(number++) + "]";
        check_entry(entry, where, manifest);
        check_transform(entry, where, manifest);
        expect(names.insert(entry.at("name")).second, in + "adapters", "every name once", entry.at("name"));
        const Json row = entry.value("row", Json());
        if (!row.is_null()) expect(rows.insert(row).second, in + "adapters", "every row once", row);
    }
    check_tensors(manifest, in);
    check_files(manifest.at("files"), manifest.at("graphs"), in);
    check_classes(manifest, in);
}

}  // namespace hhdeploy
