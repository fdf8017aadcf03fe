//! Loads that must end, and how.

mod support;

use std::fs;
use std::os::unix::fs::FileExt;

use evenkeel::checkpoint::Checkpoint;
use evenkeel::error::Setting;
use evenkeel::generate::{GenerateOptions, TooLong};
use evenkeel::loader::{LoadEvent, LoadOptions, WeightError};
use evenkeel::machine::Inventory;
use evenkeel::plan::{DoesNotFit, Plan, PlanOptions};
use evenkeel::quant::Scheme;
use evenkeel::{Cancel, Error, ErrorKind};
use support::{fixture, load_plan, roomy};

/// A copy of a small checkpoint that a test may change.
fn copy() -> (tempfile::TempDir, Checkpoint) {
    let directory = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture("parity/llama")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, directory.path().join(path.file_name().unwrap())).unwrap();
    }
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    (directory, checkpoint)
}

fn plan(checkpoint: &Checkpoint, scheme: Scheme) -> Plan {
    let options = PlanOptions { quantize: Some(scheme.into()), ..PlanOptions::default() };
    Plan::new(checkpoint, &roomy(), &options).unwrap()
}

fn refused(checkpoint: &Checkpoint, scheme: Scheme) -> Error {
    load_plan(&plan(checkpoint, scheme)).err().unwrap()
}

#[test]
fn a_weight_that_is_not_finite_is_named() {
    const TENSOR: &str = "model.layers.1.mlp.down_proj.weight";
    let (directory, checkpoint) = copy();
    let tensor = &checkpoint.catalog[TENSOR];
    let shard = directory.path().join(&checkpoint.shards[tensor.shard]);
    let columns = tensor.shape[1];
    for (value, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let file = fs::OpenOptions::new().write(true).open(&shard).unwrap();
        file.write_all_at(&value.to_le_bytes(), tensor.range.start + 4 * (3 * columns + 5)).unwrap();
        drop(file);
        for scheme in [Scheme::Int8, Scheme::Int4] {
            let error = refused(&checkpoint, scheme);
            assert_eq!(error.to_string(), format!("tensor `{TENSOR}` has {shown} at row 3, column 5"));
            assert_eq!(error.kind(), ErrorKind::Input);
            let cause = error.cause::<WeightError>().unwrap();
            assert!(matches!(cause, WeightError::NotFinite { tensor, row: 3, col: 5, .. } if tensor == TENSOR));
            assert_eq!(error.hints()[0].settings(), [Setting::Quantize(Some("none"))]);
            assert_eq!(error.hints()[0].to_string(), "the scheme `none` loads the weights as they are");
        }
        assert!(load_plan(&plan(&checkpoint, Scheme::None)).is_ok());
    }
}

#[test]
fn what_does_not_fit_and_what_is_too_long_say_so_in_numbers() {
    let (_directory, checkpoint) = copy();
    let small = Plan::new(&checkpoint, &Inventory::described("cpu=513MiB").unwrap(), PlanOptions::default()).unwrap();
    let error = load_plan(&small).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::DoesNotFit);
    assert_eq!(error.cause::<DoesNotFit>().unwrap().devices, small.devices);

    let options = PlanOptions { context: Some(8), ..PlanOptions::default() };
    let plan = Plan::new(&checkpoint, &roomy(), &options).unwrap();
    let options = GenerateOptions { max_new_tokens: Some(7), ..GenerateOptions::default() };
    let mut model = load_plan(&plan).unwrap();
    let error = model.generate_from(&[1, 2], options).err().unwrap();
    assert_eq!(error.cause(), Some(&TooLong { context: 8, prompt: 2, wanted: 7 }));
    assert_eq!(error.hints()[0].settings(), [Setting::Context(9)]);
}

#[test]
fn a_shard_that_changed_since_its_header_was_read_is_refused() {
    let (directory, checkpoint) = copy();
    let shard = directory.path().join(&checkpoint.shards[2]);
    let bytes = fs::read(&shard).unwrap();
    for changed in [&bytes[..bytes.len() - 1], &[&bytes[..], &[0]].concat()] {
        fs::write(&shard, changed).unwrap();
        let error = refused(&checkpoint, Scheme::None);
        assert!(error.to_string().ends_with("has changed while it was being loaded"), "{error}");
        assert!(error.to_string().contains(&checkpoint.shards[2]), "{error}");
    }
    fs::remove_file(&shard).unwrap();
    assert_eq!(refused(&checkpoint, Scheme::Int4).kind(), ErrorKind::Input);
}

#[test]
fn a_load_can_be_stopped() {
    let (_directory, checkpoint) = copy();
    let cancel = Cancel::new();
    let options = LoadOptions { cancel: cancel.clone(), ..LoadOptions::default() };
    let mut placed = 0;
    let result = plan(&checkpoint, Scheme::Int8).load(&options, |event| {
        if let LoadEvent::Placed { .. } = event {
            placed += 1;
            if placed == 3 {
                cancel.cancel();
            }
        }
    });
    assert_eq!(result.err().unwrap().kind(), ErrorKind::Interrupted);
    assert_eq!(placed, 3);
}

#[test]
fn a_checkpoint_without_a_tokenizer_is_refused_before_its_weights_are_read() {
    let (directory, checkpoint) = copy();
    let plan = plan(&checkpoint, Scheme::None);
    fs::remove_file(directory.path().join(&checkpoint.shards[0])).unwrap();
    fs::write(directory.path().join("tokenizer.json"), "{}").unwrap();
    let error = load_plan(&plan).err().unwrap();
    assert!(error.to_string().ends_with("tokenizer.json` is no tokenizer that can be read"), "{error}");
    fs::remove_file(directory.path().join("tokenizer.json")).unwrap();
    let error = load_plan(&plan).err().unwrap();
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
}

#[test]
fn an_offload_directory_that_cannot_be_used_is_an_error() {
    let (_directory, checkpoint) = copy();
    let map = evenkeel::device_map::DeviceMap::parse("map.json", br#"{"": "disk"}"#.to_vec()).unwrap();
    let options = PlanOptions { device_map: Some(map), ..PlanOptions::default() };
    let plan = Plan::new(&checkpoint, &roomy(), &options).unwrap();
    let options = LoadOptions { offload_directory: "/nowhere".into(), ..LoadOptions::default() };
    let error = plan.load(&options, |_| ()).err().unwrap();
    assert_eq!(error.to_string(), "cannot make a scratch file in `/nowhere`");
}
