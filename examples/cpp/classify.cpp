// Pictures to answers, with OpenVINO: the adapters of a bundle, all in one batch. See README.md.

#include <algorithm>
#include <cmath>
#include <iostream>
#include <map>
#include <openvino/openvino.hpp>

#include "bundle.hpp"
#include "picture.hpp"

using namespace hhdeploy;

namespace {

struct Options {
    std::string bundle, precision = "float32";
    std::vector<std::string> pictures, adapters;
    bool json = false, graphs = false;
};

// --- What its numbers mean ---------------------------------------------------------------------

std::string label_of(const Json& entry, size_t index) {
    const Json names = entry.value("class_names", Json());
    return names.is_array() && index < names.size() ? names[index].get<std::string>() : std::to_string(index);
}

std::string kind_of(const Json& entry, size_t classes) {
    const std::string fallback =
        classes == 1 && entry.at("name") != "backbone" ? "regression" : "single_label_classification";
    const Json kind = entry.value("problem_type", Json());
    return kind.is_string() ? kind.get<std::string>() : fallback;
}

// -infinity is an answer (a class that is ruled out), but no value of a regression; NaN and infinity, or -infinity
// alone, are none: the best class of them would be the first.
bool are_numbers(const Json& entry, const std::vector<float>& logits) {
    const auto finite = [](float value) { return std::isfinite(value); };
    const auto wrong = [](float value) { return std::isnan(value) || value == INFINITY; };
    const bool values = kind_of(entry, logits.size()) == "regression";
    return (values ? std::all_of(logits.begin(), logits.end(), finite)
                   : std::any_of(logits.begin(), logits.end(), finite)) &&
           std::none_of(logits.begin(), logits.end(), wrong);
}

// What an adapter says: the most probable class, every label of 0.5 or more, or all values.
Json said(const Json& entry, const std::vector<float>& logits) {
    const std::string kind = kind_of(entry, logits.size());
    Json answers = Json::array();
    const auto say = [&](size_t index, double score) {
        answers.push_back({{"label", label_of(entry, index)}, {"score", score}});
    };
    if (kind == "single_label_classification") {
        const size_t best = std::max_element(logits.begin(), logits.end()) - logits.begin();
        double sum = 0;
        for (float value : logits) sum += std::exp(double(value) - logits[best]);
        say(best, 1 / sum);
        return answers;
    }
    for (size_t i = 0; i < logits.size(); ++i) {
        const double score = kind == "regression" ? logits[i] : 1 / (1 + std::exp(-double(logits[i])));
        if (kind == "regression" || score >= 0.5) say(i, score);
    }
    return answers;
}

// --- The run -----------------------------------------------------------------------------------

struct Ask {
    std::string picture;
    Json entry;
};

// Every picture for every adapter, as one batch: [{picture, adapter, answers, logits}].
Json classify(const Bundle& bundle, const std::vector<Ask>& asks, const std::string& precision, bool graphs) {
    ov::Core core;
    std::map<std::string, PictureGraph> makers;  // by adapter
    const Transform first(asks.at(0).entry);
    ov::Tensor images(ov::element::f32, first.shape(asks.size())), ids(ov::element::i64, {asks.size()});
    for (size_t i = 0; i < asks.size(); ++i) {
        const Transform transform(asks[i].entry);
        const Picture picture = read_png(asks[i].picture, transform.turned());
        float* const image = images.data<float>() + i * first.size();
        if (graphs) {
            const Json& graph = asks[i].entry.at("preprocess_graph");
            const std::string name = asks[i].entry.at("name");
            if (!makers.count(name))
                makers.emplace(name, PictureGraph(core, bundle.checked(graph.at("file")), graph.at("inputs")));
            makers.at(name)(picture, image);
        } else {
            transform(picture, image);
        }
        if (bundle.chooses()) ids.data<int64_t>()[i] = asks[i].entry.at("row");
    }
    const ov::Tensor bank = bundle.chooses() ? bundle.bank() : ov::Tensor();
    ov::CompiledModel model = core.compile_model(bundle.graph(precision).string(), "CPU",
                                                 ov::hint::inference_precision(ov::element::f32));
    check_graph(model, bundle.manifest.at("tensors"), (bundle.path / "hhdeploy.json").string());
    ov::InferRequest request = model.create_infer_request();
    request.set_tensor("images", images);
    if (bundle.chooses()) {
        request.set_tensor("adapter_ids", ids);
        if (!bundle.manifest.at("bank_as_constant")) request.set_tensor("adapter_bank", bank);
    }
    request.infer();
    const ov::Tensor logits = request.get_tensor("logits");
    if (logits.get_shape() != ov::Shape{asks.size(), bundle.manifest.at("classes")})
        throw Error(bundle.path.string() + ": its graph gives logits of other sizes than its manifest tells.");
    Json results = Json::array();
    for (size_t i = 0; i < asks.size(); ++i) {
        const float* row = logits.data<float>() + i * logits.get_shape()[1];
        // What follows an adapter's own columns is padding.
        const std::vector<float> own(row, row + asks[i].entry.at("classes").get<size_t>());
        const std::string name = asks[i].entry.at("name");
        if (!are_numbers(asks[i].entry, own))
            throw Error(asks[i].picture + ", adapter " + name + ": the logits are no numbers (NaN or infinity) in " +
                        precision + ". Try another --precision; if float32 gives none either, compare the bundle " +
                        "with its reference: hhdeploy verify.");
        results.push_back({{"picture", asks[i].picture},
                           {"adapter", name},
                           {"answers", said(asks[i].entry, own)},
                           {"logits", own}});
    }
    return results;
}

Options parse(int count, char** words) {
    Options options;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        const bool takes = word == "--adapter" || word == "--precision";
        if (takes && i + 1 == count) throw Error(word + " needs a value.");
        if (word == "--adapter")
            options.adapters.push_back(words[++i]);
        else if (word == "--precision")
            options.precision = words[++i];
        else if (word == "--json")
            options.json = true;
        else if (word == "--graphs")
            options.graphs = true;
        else if (word.rfind("--", 0) == 0)
            throw Error("unknown option " + word + ".");
        else if (options.bundle.empty())
            options.bundle = word;
        else
            options.pictures.push_back(word);
    }
    if (options.pictures.empty())
        throw Error(
            "usage: classify BUNDLE PICTURE.png ... [--adapter NAME ...] [--precision P] [--graphs] [--json]");
    return options;
}

void run(const Options& options) {
    const Bundle bundle(options.bundle);
    if (bundle.manifest.at("classes") == 0) throw Error(options.bundle + ": its graph has no logits to answer with.");
    std::vector<Ask> asks;
    for (const std::string& picture : options.pictures)
        for (const std::string& name : options.adapters.empty() ? bundle.names() : options.adapters)
            asks.push_back({picture, bundle.adapter(name)});
    if (asks.empty()) throw Error(options.bundle + " has no adapter to ask.");
    const Json results = classify(bundle, asks, options.precision, options.graphs);
    if (options.json) {
        std::cout << results.dump() << "\n";
        return;
    }
    for (const Json& result : results)
        for (const Json& answer : result.at("answers"))
            std::cout << result.at("picture").get<std::string>() << "\t" << result.at("adapter").get<std::string>()
                      << "\t" << answer.at("label").get<std::string>() << "\t" << answer.at("score").get<double>()
                      << "\n";
}

}  // namespace

int main(int count, char** words) {
    try {
        run(parse(count, words));
        return 0;
    } catch (const std::exception& error) {
        std::cerr << "Error: " << error.what() << "\n";
        return 1;
    }
}
