use serde_json::{Value, json};

use super::*;

fn memory(value: &Value) -> MaxMemory {
    let budgets = value.as_object().unwrap().iter();
    budgets.map(|(id, bytes)| (id.parse().unwrap(), Bytes(bytes.as_u64().unwrap()))).collect()
}

fn devices(value: &Value) -> BTreeMap<String, DeviceId> {
    let device = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned).parse().unwrap();
    value.as_object().unwrap().iter().map(|(path, id)| (path.clone(), device(id))).collect()
}

fn tensor(name: &str, elements: u64) -> Tensor {
    Tensor { name: name.to_owned(), bytes: Bytes(4 * elements) }
}

fn parent<const N: usize>(children: [(&str, Module); N]) -> Module {
    Module { children: children.map(|(name, child)| (name.to_owned(), child)).into(), ..Module::default() }
}

fn linear(inputs: u64, outputs: u64) -> Module {
    Module { parameters: vec![tensor("weight", inputs * outputs), tensor("bias", outputs)], ..Module::default() }
}

/// `ModelForTest` of Accelerate: 64, 72 and 100 bytes.
fn small() -> Module {
    let norm = Module {
        parameters: vec![tensor("weight", 4), tensor("bias", 4)],
        buffers: vec![tensor("running_mean", 4), tensor("running_var", 4), tensor("num_batches_tracked", 2)],
        ..Module::default()
    };
    parent([("linear1", linear(3, 4)), ("batchnorm", norm), ("linear2", linear(4, 5))])
}

fn whole(module: Module) -> Module {
    Module { is_whole: true, ..module }
}

fn tied(root: Module, ties: &[(&str, &str)]) -> Model {
    let ties = ties.iter().map(|(target, source)| ((*target).to_owned(), (*source).to_owned())).collect();
    Model { root, ties, is_quantized: false }
}

fn assert_map(model: &Model, budgets: &Value, expected: &Value) {
    let placement = infer_auto_device_map(model, &memory(budgets)).unwrap();
    assert_eq!(placement.device_map, devices(expected), "{budgets}");
}

#[test]
fn maps_of_small_models() {
    let three = |module: Module| parent([("0", module.clone()), ("1", module.clone()), ("2", module)]);
    let linears = parent([("linear1", linear(10, 4)), ("linear2", linear(4, 4)), ("linear3", linear(4, 8))]);
    let apart = json!({"linear1": 0, "batchnorm": 1, "linear2": 1});
    let halves = json!({"0": 0, "1.linear1": 0, "1.batchnorm": 0, "1.linear2": 1, "2": 1});
    for (root, budgets, expected) in [
        (small(), json!({"0": 200, "1": 200}), apart.clone()),
        (small(), json!({"0": 200, "1": 172, "2": 200}), apart),
        (three(small()), json!({"0": 500, "1": 500}), halves),
        (three(whole(small())), json!({"0": 500, "1": 500}), json!({"0": 0, "1": 1, "2": 1})),
        (parent([("module", linears)]), json!({"0": 256}), json!({"": "disk"})),
    ] {
        assert_map(&tied(root, &[]), &budgets, &expected);
    }
}

#[test]
fn what_is_tied_goes_together() {
    let mut shared = small();
    shared.children[0].parameters[0] = tensor("weight", 20);
    let shared = tied(shared, &[("linear2.weight", "linear1.weight")]);
    assert_map(&shared, &json!({"0": 200, "1": 200}), &json!({"": 0}));

    let squares = parent([
        ("linear1", linear(4, 4)),
        ("linear2", linear(6, 6)),
        ("linear3", linear(4, 4)),
        ("linear4", linear(6, 6)),
    ]);
    let ties = [("linear3.weight", "linear1.weight"), ("linear3.bias", "linear1.bias")];
    let expected = json!({"linear1": 0, "linear2": 1, "linear3": 0, "linear4": 1});
    assert_map(&tied(squares, &ties), &json!({"0": 250, "1": 400}), &expected);

    // `compute.weight` is a beginning of the other's path and does not hold it.
    let inner = Module { parameters: vec![tensor("parameter", 1)], ..Module::default() };
    let compute = Module { parameters: vec![tensor("weight", 1)], ..parent([("weight_submodule", inner)]) };
    let model = tied(parent([("compute", compute)]), &[("compute.weight_submodule.parameter", "compute.weight")]);
    assert_map(&model, &json!({"0": 4, "cpu": 96_000}), &json!({"compute": 0}));
}

#[test]
fn tied_modules_are_split_to_go_together() {
    let ties = [
        ("layer3.linear2.weight", "layer1.linear2.weight"),
        ("layer2.linear2.weight", "layer1.linear2.weight"),
        ("layer2.linear1.weight", "layer1.linear1.weight"),
    ];
    let rest = json!({"layer3.linear1": 1, "layer3.batchnorm": 1, "layer2.batchnorm": 1});
    for (count, expected) in [
        (1, json!({"layer1": 0, "layer3.linear2": 0, "layer2": 1, "layer3.linear1": 1, "layer3.batchnorm": 1})),
        (2, json!({"layer1": 0, "layer3.linear2": 0, "layer2.linear2": 0, "layer2.linear1": 1})),
        (3, json!({"layer1": 0, "layer3.linear2": 0, "layer2.linear2": 0, "layer2.linear1": 0})),
    ] {
        let mut expected = expected;
        if count > 1 {
            let rest = rest.as_object().unwrap().clone();
            expected.as_object_mut().unwrap().extend(rest);
        }
        let root = parent([("layer1", small()), ("layer2", small()), ("layer3", small())]);
        assert_map(&tied(root, &ties[..count]), &json!({"0": 400, "1": 500}), &expected);
    }
}

/// Accelerate's own planner has 215 for 243: its buffer is made of a mean.
#[test]
fn balanced_budgets() {
    let model = tied(small(), &[]);
    for (user, expected) in [
        (json!({"0": 200, "1": 200}), json!({"0": 200, "1": 200})),
        (json!({"0": 200, "2": 200}), json!({"0": 200, "2": 200})),
        (json!({"0": 300, "1": 300}), json!({"0": 243, "1": 300})),
        (json!({"0": 300, "1": 500}), json!({"0": 243, "1": 500})),
        (json!({"0": 300, "cpu": 1000}), json!({"0": 300, "cpu": 1000})),
        (json!({"0": 0, "1": 300, "2": 300}), json!({"0": 0, "1": 243, "2": 300})),
        (json!({"0": 0, "cpu": 100}), json!({"0": 0, "cpu": 100})),
    ] {
        let budgets = super::budgets(&model, &MaxMemory::new(), Some(&memory(&user)), Strategy::HfAuto).unwrap();
        assert_eq!(budgets, memory(&expected), "{user}");
    }
}

#[test]
fn what_is_kept_free() {
    let mut model = tied(small(), &[]);
    let free = memory(&json!({"0": 1001, "cpu": 10_001, "disk": 5}));
    let budgets = |model: &Model, mode| super::budgets(model, &free, None, mode).unwrap();
    assert_eq!(budgets(&model, Strategy::HfAuto), memory(&json!({"0": 900, "cpu": 9000})));
    assert_eq!(budgets(&model, Strategy::HfBalancedLowZero), memory(&json!({"0": 900, "cpu": 9000})));
    assert_eq!(budgets(&model, Strategy::HfSequential), memory(&json!({"0": 1001, "cpu": 9000})));
    model.is_quantized = true;
    // 1001 * 0.9 * 0.9 and 10001 * 0.9 * 0.9; only the last product is cut.
    assert_eq!(budgets(&model, Strategy::HfAuto), memory(&json!({"0": 810, "cpu": 8100})));
    assert_eq!(budgets(&model, Strategy::HfSequential), memory(&json!({"0": 900, "cpu": 8100})));
}

#[test]
fn what_makes_transformers_fail_is_an_error() {
    let model = tied(small(), &[]);
    for gap in [json!({"0": 300, "2": 300}), json!({"1": 300, "2": 300})] {
        let error = budgets(&model, &memory(&gap), None, Strategy::HfBalancedLowZero).unwrap_err();
        assert!(error.to_string().contains("without a gap"), "{error}");
    }
    let both = Module { parameters: vec![tensor("a", 9), tensor("b", 9)], ..Module::default() };
    for ties in [("b", "a"), ("b", "c")] {
        let model = tied(both.clone(), &[ties]);
        let error = infer_auto_device_map(&model, &memory(&json!({"0": 300}))).unwrap_err();
        assert!(error.to_string().contains("tied"), "{error}");
    }
}
