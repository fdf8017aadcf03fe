//! The house: a room uses only the rooms below it, and no files use each other in a circle.

#[path = "support/imports.rs"]
mod imports;

use std::path::{Path, PathBuf};

use imports::Crate;

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
    (0, "pool"),
    (1, "machine"),
    (1, "model_config"),
    (1, "text"),
    (1, "checkpoint"),
    (2, "quant"),
    (2, "architecture"),
    (2, "footprint"),
    (3, "device_map"),
    (3, "plan"),
    (4, "backend"),
    (4, "engine"),
    (4, "loader"),
    (5, "export"),
    (5, "generate"),
    (5, "hub"),
    (5, "verify"),
    (6, "openai"),
    (7, "serve"),
    (8, "cli"),
];

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn house() -> Crate {
    Crate::of(&imports::sources(&src()))
}

/// The room that a file of `src` belongs to; `None` for lib.rs and main.rs.
fn room(file: &str) -> Option<&str> {
    let name = file.split('/').next()?.trim_end_matches(".rs");
    (!["lib", "main"].contains(&name)).then_some(name)
}

fn position(room: &str) -> usize {
    let known = ROOMS.iter().position(|(_, name)| *name == room);
    known.unwrap_or_else(|| panic!("`{room}` is not in the list of rooms"))
}

/// Uses of other rooms, and those among them of rooms that do not stand below.
fn uses_of_rooms(house: &Crate) -> (usize, Vec<String>) {
    let uses = house.uses();
    let rooms = uses.iter().filter_map(|(file, used)| Some((*file, *used, room(file)?, room(used)?)));
    let others: Vec<_> = rooms.filter(|(_, _, own, used)| own != used).collect();
    let upward = others.iter().filter(|(_, _, own, used)| position(used) > position(own));
    (others.len(), upward.map(|(file, used, ..)| format!("{file} uses {used}")).collect())
}

#[test]
fn a_room_uses_only_the_rooms_below_it() {
    let (count, upward) = uses_of_rooms(&house());
    assert!(count > 200, "only {count} uses were found");
    assert!(upward.is_empty(), "{upward:#?}");
}

#[test]
fn no_files_use_each_other_in_a_circle() {
    let house = house();
    assert!(house.circles().is_empty(), "{:#?}", house.circles());
}

#[test]
fn backends_know_no_plan() {
    let house = house();
    let from = |room: &str| house.uses().into_iter().filter(|(file, _)| file.starts_with(room)).collect::<Vec<_>>();
    let backend = from("backend/");
    assert!(backend.len() > 50, "{backend:?}");
    let arrows: Vec<_> = backend.iter().filter(|(_, used)| room(used) == Some("plan")).collect();
    assert!(arrows.is_empty(), "{arrows:#?}");
}

#[test]
fn every_way_to_name_a_room_is_seen() {
    for (file, text) in [
        ("quant/mod.rs", "use crate::plan::Plan;"),
        ("quant/mod.rs", "use crate::{error, plan};"),
        ("quant/mod.rs", "use crate::{\n    error::Error,\n    quant::{self, x},\n    plan::{self as p, Plan},\n};"),
        ("quant/mod.rs", "pub(crate) use crate::{error::*, plan::*};"),
        ("quant/mod.rs", "fn f(it: &str) -> bool { !crate::plan::Plan::of::<'_', '\"'>(it) }"),
        ("quant/mod.rs", "use crate::Plan;"),
        ("quant/mod.rs", "use super::Plan as Its;"),
        ("quant/mod.rs", "use self::super::{plan};"),
        ("quant/mod.rs", "mod inner { use super::super::plan; }"),
        ("quant/groups.rs", "use crate::{self as root, error}; use super::super::plan::Plan;"),
        ("quant/groups.rs", "macro_rules! of { ($name:ident) => { mod $name { use $crate::plan::Plan; } } }"),
        ("plan/fast.rs", "use crate::backend::{cpu::{self}};"),
        ("plan/fast.rs", "fn f() { evenkeel::backend::cpu::pool() }"),
        ("plan/fast.rs", "use evenkeel::{Error, backend};"),
    ] {
        let others = ["error.rs", "plan/mod.rs", "backend/mod.rs", "backend/cpu.rs", "quant/mod.rs"];
        let others = others.into_iter().filter(|name| *name != file).map(|name| (name, ""));
        let lib = ("lib.rs", "pub use error::{Error, Result}; pub use plan::Plan;");
        let sources: Vec<_> = others.chain([lib, (file, text)]).collect();
        let (_, upward) = uses_of_rooms(&Crate::of(&sources));
        assert!(!upward.is_empty(), "{text}");
    }
}

#[test]
fn what_is_no_use_is_not_seen() {
    for text in [
        "// use crate::plan::Plan;",
        "/* use /* crate::plan; */ crate::plan::Plan; */",
        r##"const TEXT: &str = r#"use "crate::plan::Plan";"#;"##,
        r#"const TEXT: (&str, char, &[u8]) = ("\" crate::plan::Plan", '"', b"crate::plan::Plan");"#,
        "use std::{plan, fmt::{self, plan::Plan}}; fn f(plan: plan::Plan) {}",
        "use crate::{error::plan, error}; fn f() -> impl Fn() + use<'_> {}",
    ] {
        let (_, upward) =
            uses_of_rooms(&Crate::of(&[("lib.rs", ""), ("error.rs", ""), ("plan.rs", ""), ("quant.rs", text)]));
        assert!(upward.is_empty(), "{text}: {upward:?}");
    }
}

#[test]
fn circles_are_found() {
    const ROOM: (&str, &str) =
        ("a/mod.rs", "mod x; mod y; mod z; pub use x::X; pub use z::Z; use y::Y; pub struct Own(Y);");
    let circles = |x: &str, y: &str, z: &str| -> Vec<Vec<String>> {
        let house = Crate::of(&[
            ("lib.rs", ""),
            ROOM,
            ("a/x.rs", x),
            ("a/y.rs", y),
            ("a/z.rs", z),
            ("b.rs", "use crate::a::Own;"),
        ]);
        house.circles().into_iter().map(|circle| circle.into_iter().map(str::to_owned).collect()).collect()
    };
    // What is asked of the room around a file comes from where it is defined.
    let two = [["a/x.rs", "a/z.rs"]];
    assert_eq!(circles("use super::{Own, Z};", "use super::X;", "use crate::a::X; use super::Own;"), two);
    assert_eq!(circles("use super::z::{self};", "", "fn f() { super::X::new() }"), two);
    assert_eq!(circles("fn f() { use crate::a; a::Z }", "", "mod w { use super::super::X; }"), two);
    assert_eq!(circles("use super::Y;", "use super::Z;", "use super::X;"), [["a/x.rs", "a/y.rs", "a/z.rs"]]);
    // A room uses its files, and b.rs the room.
    assert_eq!(circles("", "use crate::b::B;", ""), [["a/mod.rs", "a/y.rs", "b.rs"]]);
    let none: [[&str; 0]; 0] = [];
    assert_eq!(circles("use super::{Own, Y, Z};", "use super::Own;", "use super::{Own, Y};"), none);
    assert_eq!(circles("use super::Z;", "", "#[cfg(test)] mod tests { use super::super::X; }"), none);
    let again = circles("use super::Z;", "", "#[cfg(test)] mod tests { fn f() {} } use super::X;");
    assert_eq!(again, two);
}

#[test]
fn floors_are_in_order_and_every_room_is_there() {
    assert!(ROOMS.is_sorted_by_key(|(floor, _)| floor));
    let src = src();
    for (_, name) in ROOMS {
        assert!(src.join(name).is_dir() || src.join(format!("{name}.rs")).is_file(), "{name}");
    }
}

/// Whether a line of code names a flag or a subcommand, as only the command line may.
fn names_a_flag(line: &str) -> bool {
    const COMMANDS: [&str; 6] = ["devices", "generate", "perplexity", "plan", "quantize", "serve"];
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
    let sources = imports::sources(&src());
    let library = sources.iter().filter(|(name, _)| room(name).is_some_and(|room| room != "cli"));
    for (name, text) in library {
        let named = text.lines().find(|line| names_a_flag(line));
        assert_eq!(named, None, "{name}");
    }
}

#[test]
fn unsafe_code_stands_in_few_files() {
    let is_unsafe = |text: &str| text.contains("unsafe {") || text.contains("unsafe impl");
    let sources = imports::sources(&src());
    let rooms: Vec<_> = sources.iter().filter(|(_, text)| is_unsafe(text)).map(|(name, _)| name).collect();
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
