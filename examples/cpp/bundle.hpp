// A bundle: hhdeploy.json, and whatever it names, compared with its sha256 there.
// docs/formats.md describes them.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "files.hpp"

namespace hhdeploy {

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
    const Json name = value("name"), row = value("row"), classes = value("classes"), names = value("class_names");
    expect(name.is_string(), where + ".name", "a name", name);
    expect(name != "backbone", where + ".name", "another name than the bare model's", name);
    expect(value("verified").is_boolean(), where + ".verified", "true or false", value("verified"));
    const Json strength = entry.value("strength", Json(1));
    expect(strength.is_number(), where + ".strength", "a finite number", strength);
    const bool placed = is_count(row) && row > 0;
    expect(placed || (row.is_null() && manifest.at("kind") == "folded"), where + ".row", "1 or more", row);
    expect(is_count(classes), where + ".classes", "a number of classes", classes);
    const Json& most = manifest.at("classes");
    expect(most == 0 || classes <= most, where + ".classes", "at most the graph's " + most.dump(), classes);
    expect(entry.contains("class_names") && (names.is_null() || are(names, is_text)), where + ".class_names",
           "a list of names, or null", names);
    expect(names.empty() || names.size() == classes, where + ".class_names", classes.dump() + " names", names.size());
    static const Json kinds = {nullptr, "single_label_classification", "multi_label_classification", "regression"};
    const Json kind = value("problem_type");
    expect(std::find(kinds.begin(), kinds.end(), kind) != kinds.end(), where + ".problem_type", kinds.dump(), kind);
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

// A graph takes and gives what the manifest tells of it. Sizes that are open may be any.
inline void check_graph(const ov::CompiledModel& model, const Json& tensors, const std::string& where) {
    std::set<std::string> missing;
    for (const char* name : {"images", "adapter_ids", "adapter_bank", "logits", "features", "tokens"})
        if (tensors.contains(name)) missing.insert(name);
    std::vector<ov::Output<const ov::Node>> found = model.inputs();
    for (const auto& output : model.outputs()) found.push_back(output);
    for (const auto& tensor : found) {
        const ov::PartialShape shape = tensor.get_partial_shape();
        const auto fits = [&](const std::string& name) {
            const Json& told = tensors.at(name);
            bool same = told.is_array() && told.size() == size_t(shape.size());
            for (size_t i = 1; same && i < told.size(); ++i)
                same = shape[i].is_dynamic() || told[i] == shape[i].get_length();
            return same;
        };
        const auto names = tensor.get_names();
        const auto name = std::find_if(missing.begin(), missing.end(), [&](const auto& n) { return names.count(n) > 0; });
        if (name == missing.end() || !fits(*name))
            throw Error(where + ": tensors: expected " + tensor.get_any_name() + " of " + shape.to_string() +
                        ", which the graph has, found " + tensors.dump() + ". Copy or export the bundle again.");
        missing.erase(name);
    }
    if (!missing.empty())
        throw Error(where + ": tensors: expected those of the graph, found " + *missing.begin() +
                    ", which it has not. Copy or export the bundle again.");
}

// Every file has a digest and a role of its own (of two banks, say, that a merge left, one would be taken), every graph
// a precision that there is.
inline void check_files(const Json& files, const Json& graphs, const std::string& in) {
    static const std::regex digest("[0-9a-f]{64}"), digits(R"(\.[0-9a-f]{8}(?=\.(safetensors|json|onnx|onnx\.data|engine)$))");
    std::map<std::string, std::string> roles;
    for (const auto& [name, found] : files.items()) {
        const bool fits = found.is_string() && std::regex_match(found.get<std::string>(), digest);
        expect(fits, in + "files." + name, "64 hex digits", found);
        const auto [other, alone] = roles.emplace(std::regex_replace(name, digits, ""), name);
        if (!alone) throw Error(in + "files: expected one " + other->first + ", found " + other->second + " and " + name + ".");
    }
    static const std::set<std::string> known = {"float32", "float16", "bfloat16", "int8", "fp8", "int8-weights"};
    for (const auto& [precision, name] : graphs.items()) {
        if (!known.count(precision)) throw Error(in + "graph " + precision + ": expected one of " + Json(known).dump() + ".");
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
    const char* const fitting = value("row").is_null() ? "folded" : "branches";
    expect(kind == fitting, in + "kind", std::string(fitting) + ", as its row has it", kind);
    expect(is_count(classes), in + "classes", "a number of classes", classes);
    const Json constant = value("bank_as_constant"), row = value("row");
    expect(constant.is_boolean(), in + "bank_as_constant", "true or false", constant);
    if (!row.is_null()) {
        expect(row.is_object(), in + "row", "an object, or null", row);
        const Json own = row.value("classes", Json()), kept = row.value("backbone_head", Json());
        expect(is_count(own), in + "row.classes", "a number", own);
        expect(kept.is_boolean(), in + "row.backbone_head", "true or false", kept);
    }
    for (const char* key : {"backbone", "graphs", "files"})
        expect(value(key).is_object(), in + key, "an object", value(key));
    expect(value("adapters").is_array(), in + "adapters", "a list", value("adapters"));
    const Json own = value("backbone").value("classes", Json());
    expect(is_count(own), in + "backbone.classes", "a number of classes", own);
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

class Bundle {
public:
    explicit Bundle(fs::path directory) : path(std::move(directory)) {
        const fs::path file = path / "hhdeploy.json";
        if (!fs::is_regular_file(file)) throw Error(path.string() + " is not a bundle: it has no hhdeploy.json.");
        manifest = parse(read_file(file), file.string());
        check_manifest(manifest, file.string());
    }

    // Side branches: requests choose an adapter by its row. (A folded bundle has one adapter, in the weights.)
    bool chooses() const { return manifest.at("kind") == "branches"; }

    // The bytes of a file that the manifest names. Throws if they are not those that it was written with.
    std::string read(const std::string& name) const {
        const Json& files = manifest.at("files");
        if (!files.contains(name)) throw Error(path.string() + ": hhdeploy.json names no file " + name + ".");
        std::string bytes = read_file(path / name);
        const std::string found = sha256(bytes), expected = files.at(name);
        if (found != expected)
            throw Error((path / name).string() + ": expected sha256 " + expected + ", found " + found +
                        ". It is damaged, or the bundle was changed just now: try again.");
        return bytes;
    }

    // The path of a precision's graph. OpenVINO opens it and its weights by itself, right after they are checked.
    fs::path graph(const std::string& precision) const {
        const Json& graphs = manifest.at("graphs");
        if (!graphs.contains(precision)) {
            std::string there;
            for (const auto& each : graphs.items()) there += " " + each.key();
            throw Error(path.string() + " has no " + precision + " graph; it has" + there + ".");
        }
        return checked(graphs.at(precision));
    }

    // The path of a graph, it and the weights beside it checked.
    fs::path checked(const std::string& name) const {
        read(name);
        const std::string weights = name + ".data";
        if (manifest.at("files").contains(weights)) read(weights);
        else if (fs::exists(path / weights))  // OpenVINO would open it all the same
            throw Error((path / "hhdeploy.json").string() + ": files: expected the sha256 of " + weights +
                        ", found none. Export the bundle again.");
        return path / name;
    }

    // float32 [slots, row]: a row for each adapter, the first the bare backbone's.
    ov::Tensor bank() const {
        static const std::regex role(R"(bank(\.[0-9a-f]{8})?\.safetensors)");
        for (const auto& file : manifest.at("files").items())
            if (std::regex_match(file.key(), role))
                return complete(float_tensor(read(file.key()), "adapter_bank", file.key()), file.key());
        throw Error(path.string() + ": hhdeploy.json names no bank.");
    }

    // The bank, where every adapter has the row that is said, with as many classes.
    ov::Tensor complete(ov::Tensor bank, const std::string& file) const {
        const ov::Shape shape = bank.get_shape();
        const Json& layout = manifest.at("row");
        const Json size = layout.value("size", Json());
        expect(shape.size() == 2 && shape[1] == size, file, "rows of " + size.dump() + " values", shape);
        const Json backbone = layout.at("backbone_head") == true ? manifest.at("backbone").at("classes") : Json(0u);
        const size_t columns = layout.at("classes");  // a row ends with their biases, and whether they are its own
        expect(columns < shape[1], (path / "hhdeploy.json").string() + ": row.classes", "fewer than a row's", columns);
        for (const Json& entry : manifest.at("adapters")) {
            const std::string who = "adapter " + entry.at("name").get<std::string>();
            expect(entry.at("row") < shape[0], who, "a row from 1 to " + std::to_string(shape[0] - 1), entry.at("row"));
            const float* const own = bank.data<float>() + (entry.at("row").get<size_t>() + 1) * shape[1] - 1;
            if (columns && *own != 0 && *own != 1)  // runtimes differ in what they make of NaN
                throw Error(who + ": expected a head.own of 0 or 1 in its row, found " + std::to_string(*own) + ".");
            if (!columns || *own == 0) {  // it answers with the backbone's classifier, where there is one
                expect(backbone == 0 || entry.at("classes") == backbone, who, "the backbone's " + backbone.dump() + " classes",
                       entry.at("classes"));
                continue;
            }
            size_t classes = columns;  // columns that are none of its own have a bias of -infinity
            while (classes && own[std::ptrdiff_t(classes) - 1 - std::ptrdiff_t(columns)] == -INFINITY) --classes;
            if (entry.at("classes") < classes)
                throw Error(who + ": expected " + std::to_string(classes) + " classes, which its row has, found " +
                            entry.at("classes").dump() + ". Export the bundle again.");
        }
        return bank;
    }

    // Adapters by name, and "backbone" where its classifier was kept, as the manifest's entries are.
    Json adapter(const std::string& name) const {
        for (const Json& entry : manifest.at("adapters"))
            if (entry.at("name") == name) return entry;
        const Json& backbone = manifest.at("backbone");
        if (name == "backbone" && chooses() && manifest.at("row").at("backbone_head")) {
            Json entry = {{"name", name}, {"row", 0}};
            for (const char* key : {"classes", "preprocess", "preprocess_graph"})
                if (backbone.contains(key)) entry[key] = backbone.at(key);
            return entry;
        }
        std::string there;
        for (const std::string& other : names()) there += " " + other;
        throw Error(path.string() + " has no adapter " + name + "; it has" + there + ".");
    }

    std::vector<std::string> names() const {
        std::vector<std::string> found;
        for (const Json& entry : manifest.at("adapters")) found.push_back(entry.at("name"));
        return found;
    }

    const fs::path path;
    Json manifest;
};

}  // namespace hhdeploy
