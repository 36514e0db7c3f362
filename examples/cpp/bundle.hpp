// A bundle: hhdeploy.json, and whatever it names, compared with its sha256 there.
// docs/formats.md describes them.
#pragma once

#include <algorithm>
#include <cmath>
#include <regex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "files.hpp"
#include "manifest.hpp"

namespace hhdeploy {

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
        if (manifest.at("files").contains(weights)) {
            read(weights);
            if (fs::canonical(path / weights).parent_path() != fs::canonical(path))
                throw Error((path / weights).string() + " is a link, which OpenVINO does not follow out of a folder: copy "
                            "the bundle with what its links lead to (cp -rL).");
        } else if (fs::exists(path / weights))  // OpenVINO would open it all the same
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
