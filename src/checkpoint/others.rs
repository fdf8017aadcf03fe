//! What is no checkpoint, or one in another form: errors that name it.

use std::path::Path;

use safetensors::Dtype;

use super::{Checkpoint, Origin, SINGLE_FILE, Source, index};
use crate::bytes::{Bytes, MIB};
use crate::error::{Error, Hint, Result, Setting, printable};
use crate::json::{Document, Node};
use crate::{fs, model_config};

const ADAPTER: &str = "adapter_config.json";
/// Files that say how weights were quantized, the key that names the method, and whose form it is.
const QUANTIZED: [(&str, &[&str], &str); 2] = [
    ("quantize_config.json", &["quant_method"], "GPTQ"),
    ("hf_quant_config.json", &["quantization", "quant_algo"], "ModelOpt"),
];
/// The largest of such files that is read.
const CAP: Bytes = Bytes(MIB);

/// Refuses what has no configuration, and is known.
pub fn check_configuration(source: &dyn Source) -> Result<()> {
    if source.has(model_config::FILE) {
        return Ok(());
    }
    let name = shown(source);
    let known = adapter(source).or_else(|| gguf(source)).or_else(|| cached(source)).or_else(|| {
        let of_vendor = source.has("params.json").then(|| Error::input(format!("`{name}` is in its maker's own form")));
        of_vendor.map(|error| error.hint("name the checkpoint in the form of Transformers, which has a config.json"))
    });
    known.map_or(Ok(()), Err)
}

/// The error of a checkpoint that has a configuration and no weights.
pub fn no_weights(source: &dyn Source) -> Error {
    let pickles = ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"];
    adapter(source).or_else(|| gguf(source)).unwrap_or_else(|| {
        let error = Error::input(format!("`{}` is missing, and so is `{}`", source.display(SINGLE_FILE), index::FILE));
        match pickles.iter().find(|file| source.has(file)) {
            Some(file) => error
                .hint(format!("`{file}` is a Python pickle, which can run code and is never read"))
                .hint(converted(&shown(source), "")),
            None => error.hint("the directory must hold a checkpoint in safetensors format, as Transformers saves it"),
        }
    })
}

/// Refuses weights that another tool has quantized, where a file beside config.json says so alone.
pub fn check_quantized(source: &dyn Source, checkpoint: &Checkpoint) -> Result<()> {
    let is_plain = |dtype| matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16);
    if checkpoint.config.packed.is_some() || checkpoint.catalog.values().all(|tensor| is_plain(tensor.dtype)) {
        return Ok(());
    }
    let Some((file, keys, form)) = QUANTIZED.iter().find(|(file, ..)| source.has(file)) else { return Ok(()) };
    let method = text(source, file, keys).map_or(String::new(), |method| format!(", `{}`", printable(&method)));
    let what = format!("is already quantized in the form of {form}{method}, which is not supported");
    Err(Error::input(format!("`{}` {what}; `{}` says so", checkpoint.name, source.display(file))).hint(Hint::naming(
        "name the unquantized checkpoint that it was made from; {} quantizes while loading",
        [Setting::Quantize(None)],
    )))
}

/// The error of a directory that holds an adapter.
fn adapter(source: &dyn Source) -> Option<Error> {
    if !source.has(ADAPTER) {
        return None;
    }
    let of = |key| text(source, ADAPTER, &[key]).map(|text| printable(&text));
    let base = of("base_model_name_or_path").map_or("another model".to_owned(), |base| format!("`{base}`"));
    let kind = of("peft_type").map_or(String::new(), |kind| format!(" ({kind})"));
    let name = shown(source);
    let merged = format!("{name}-merged");
    let merge = python(&format!(
        "from peft import AutoPeftModelForCausalLM as M; M.from_pretrained({name:?}).merge_and_unload().save_pretrained({merged:?})"
    ));
    Some(
        Error::input(format!("`{name}` is an adapter{kind} of {base}, not a whole model"))
            .hint(format!("merge it into its base and name the result: `{merge}`")),
    )
}

/// The error of a directory with weights in GGUF and none that are read.
fn gguf(source: &dyn Source) -> Option<Error> {
    let files = source.directory()?.read_dir().ok()?;
    let name = files.flatten().map(|file| file.file_name()).find(|name| is_gguf(name.as_ref()))?;
    let name = printable(&name.to_string_lossy());
    let error = Error::input(format!("`{}` holds weights in GGUF (`{name}`), which are not read", shown(source)));
    Some(error.hint(converted(&shown(source), &format!(", gguf_file={name:?}"))))
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// The error of a repository in a Hugging Face cache, of which one snapshot is meant.
fn cached(source: &dyn Source) -> Option<Error> {
    let directory = source.directory()?;
    let snapshots = directory.join("snapshots");
    let main =
        fs::read_capped(&directory.join("refs/main"), MAX_COMMIT).ok().and_then(|text| String::from_utf8(text).ok());
    let main = main.as_deref().map(str::trim).filter(|commit| fs::is_plain_name(commit));
    let main = main.map(|commit| snapshots.join(commit)).filter(|snapshot| snapshot.is_dir());
    let any = || snapshots.read_dir().ok()?.flatten().map(|entry| entry.path()).find(|path| path.is_dir());
    let snapshot = main.or_else(any)?;
    let what = "is a repository in a Hugging Face cache, whose snapshots are checkpoints";
    Some(Error::input(format!("`{}` {what}", shown(source))).hint(format!("name `{}`", snapshot.display())))
}

/// The longest name of a commit that is read.
const MAX_COMMIT: Bytes = Bytes(100);

fn converted(name: &str, more: &str) -> String {
    let save = format!("save_pretrained({:?})", format!("{name}-safetensors"));
    let convert =
        format!("from transformers import AutoModelForCausalLM as M; M.from_pretrained({name:?}{more}).{save}");
    format!("Transformers makes safetensors of it: `{}`", python(&convert))
}

/// A command for a shell, whatever names are in it.
fn python(program: &str) -> String {
    // Only a NUL cannot be quoted, and no name of a file has one.
    shlex::try_join(["python", "-c", program]).unwrap_or_default()
}

fn shown(source: &dyn Source) -> String {
    match source.origin() {
        Origin::Repository { repository, .. } => repository,
        Origin::Directory { path } => source.directory().unwrap_or(&path).display().to_string(),
    }
}

/// The text under `keys`, one in the other, in a JSON file.
fn text(source: &dyn Source, file: &str, keys: &[&str]) -> Option<String> {
    let document = Document::parse(source.display(file), source.read(file, CAP).ok()?).ok()?;
    let inner = |node: Node| -> Option<String> {
        let mut node = node;
        for key in keys {
            node = node.members_to_read().ok()?.into_iter().find(|member| member.name == *key)?.value;
        }
        node.text().ok()
    };
    inner(document.root())
}
