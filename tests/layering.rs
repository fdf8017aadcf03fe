//! The house: a room uses only the rooms below it.

use std::fs;
use std::path::{Path, PathBuf};

/// The rooms from the ground up, with their floors. A room may use any room
/// that stands before it here: those of lower floors, and on its own floor
/// those that the design has it rest on.
const ROOMS: &[(u8, &str)] = &[
    (0, "error"),
    (0, "cancel"),
    (0, "bytes"),
    (0, "device"),
    (0, "module_path"),
    (0, "name"),
    (0, "random"),
    (0, "json"),
    (0, "fs"),
    (0, "source"),
    (0, "simd"),
    (1, "machine"),
    (0, "pool"),
    (1, "model_config"),
    (1, "tokenizer"),
    (1, "checkpoint"),
    (2, "quant"),
    (2, "architecture"),
    (3, "device_map"),
    (3, "plan"),
    (4, "backend"),
    (4, "loader"),
    (5, "export"),
    (5, "generate"),
    (5, "hub"),
    (6, "cli"),
];

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// The room that a file of `src` belongs to; `None` for lib.rs and main.rs.
fn room(file: &Path, src: &Path) -> Option<String> {
    let first = file.strip_prefix(src).unwrap().components().next()?;
    let name = first.as_os_str().to_str()?.trim_end_matches(".rs");
    (!["lib", "main"].contains(&name)).then(|| name.to_owned())
}

fn position(room: &str) -> usize {
    let known = ROOMS.iter().position(|(_, name)| *name == room);
    known.unwrap_or_else(|| panic!("`{room}` is not in the list of rooms"))
}

/// Rooms that a file names as `crate::room` or `evenkeel::room`.
fn used_rooms(text: &str) -> Vec<String> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let mut rooms = Vec::new();
    for line in code {
        for prefix in ["crate::", "evenkeel::"] {
            for (at, _) in line.match_indices(prefix) {
                let rest = &line[at + prefix.len()..];
                let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                // Capitalized names are the facade's, which belong to `error`.
                if name.starts_with(char::is_lowercase) {
                    rooms.push(name);
                }
            }
        }
    }
    rooms
}

#[test]
fn a_room_uses_only_the_rooms_below_it() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut checked = 0;
    for file in rust_files(&src) {
        let Some(own) = room(&file, &src) else { continue };
        for used in used_rooms(&fs::read_to_string(&file).unwrap()) {
            assert!(
                used == own || position(&used) < position(&own),
                "{} uses `{used}`, which does not stand below `{own}`",
                file.display()
            );
            checked += 1;
        }
    }
    assert!(checked > 100, "only {checked} uses were found");
}

#[test]
fn floors_are_in_order_and_every_room_is_there() {
    assert!(ROOMS.is_sorted_by_key(|(floor, _)| floor));
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for (_, name) in ROOMS {
        assert!(src.join(name).is_dir() || src.join(format!("{name}.rs")).is_file(), "{name}");
    }
}

/// Whether a line of code names a flag or a subcommand, as only the command line may.
fn names_a_flag(line: &str) -> bool {
    const COMMANDS: [&str; 5] = ["devices", "generate", "perplexity", "plan", "quantize"];
    let starts_a_word = |at: usize| !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '-');
    let is_flag = |(at, dashes): (usize, &str)| {
        starts_a_word(at) && line[at + dashes.len()..].starts_with(|c: char| c.is_ascii_lowercase())
    };
    // The Hub's own client has flags too.
    let is_named = !line.contains("hf download") && line.match_indices("--").any(is_flag);
    is_named || COMMANDS.iter().any(|command| line.contains(&format!("evenkeel {command}")))
}

#[test]
fn the_library_names_no_flag() {
    for (line, named) in [
        (r#".hint("`--force` replaces it")"#, true),
        (r#"("--quantize", scheme)"#, true),
        (r#".hint("try evenkeel plan")"#, true),
        (r#"root.join("models--org--name")"#, false),
        (r#"format!("hf download {id} --revision {revision}")"#, false),
    ] {
        assert_eq!(names_a_flag(line), named, "{line}");
    }
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for file in rust_files(&src).iter().filter(|file| room(file, &src).is_some_and(|room| room != "cli")) {
        let text = fs::read_to_string(file).unwrap();
        let named = text.lines().find(|line| names_a_flag(line));
        assert_eq!(named, None, "{}", file.display());
    }
}

#[test]
fn unsafe_code_stands_in_few_files() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut rooms: Vec<_> = rust_files(&src)
        .into_iter()
        .filter(|file| {
            let text = fs::read_to_string(file).unwrap();
            text.contains("unsafe {") || text.contains("unsafe impl")
        })
        .map(|file| file.strip_prefix(&src).unwrap().display().to_string())
        .collect();
    rooms.sort();
    assert_eq!(
        rooms,
        [
            "backend/cpu/arena.rs",
            "backend/cpu/kernels/packed.rs",
            "backend/cpu/kernels/plain.rs",
            "backend/cuda/driver.rs",
            "backend/cuda/kernels/launch.rs",
            "pool.rs",
            "simd.rs"
        ]
    );
}
