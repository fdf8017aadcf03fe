//! Which files of a crate use which, read from their tokens.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Names from the crate's root on.
type Module = Vec<String>;

/// The files of a crate. `evenkeel::` is read as `crate::`, so that a program's files are among them.
#[derive(Default)]
pub struct Crate {
    files: Vec<File>,
    /// Modules, inline ones too, by path.
    modules: BTreeMap<Module, Names>,
}

struct File {
    name: String,
    module: Module,
    uses: Vec<Use>,
}

/// What a module brings into scope, and its file.
#[derive(Default)]
struct Names {
    file: usize,
    bound: BTreeMap<String, Vec<String>>,
}

/// A path in a file.
struct Use {
    /// The module that it stands in.
    within: Module,
    path: Vec<String>,
    is_test: bool,
    is_public: bool,
}

/// The names and texts of the Rust files under a directory.
pub fn sources(root: &Path) -> Vec<(String, String)> {
    let (mut sources, mut directories) = (Vec::new(), vec![root.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                sources.push((name, fs::read_to_string(path).unwrap()));
            }
        }
    }
    sources.sort();
    sources
}

impl Crate {
    /// Files of these names and texts.
    pub fn of(sources: &[(impl AsRef<str>, impl AsRef<str>)]) -> Self {
        let mut all = Self::default();
        for (name, text) in sources {
            all.add(name.as_ref(), &tokens(text.as_ref()));
        }
        all
    }

    fn add(&mut self, name: &str, tokens: &[String]) {
        let file = self.files.len();
        let path = name.trim_end_matches(".rs").trim_end_matches("/mod");
        let module: Module = path.split('/').filter(|name| *name != "lib").map(str::to_owned).collect();
        let is_test_file = module.last().is_some_and(|last| last == "tests");
        self.modules.entry(module.clone()).or_default().file = file;
        let mut uses = Vec::new();
        // The module at each brace that is open, and the end of the item that is only there in tests.
        let (mut open, mut tests_end) = (vec![module.clone()], 0);
        let mut at = 0;
        while let Some(token) = tokens.get(at) {
            let start = at;
            let mut found = Vec::new();
            match (&**token, tokens.get(at + 1).map_or("", String::as_str)) {
                ("{", _) => {
                    let mut inner = open[open.len() - 1].clone();
                    // A macro has `mod $name`.
                    if tokens[at.saturating_sub(3)..at.saturating_sub(1)].iter().any(|token| token == "mod") {
                        inner.push(tokens[at - 1].clone());
                        self.modules.entry(inner.clone()).or_default().file = file;
                    }
                    open.push(inner);
                }
                ("}", _) if open.len() > 1 => drop(open.pop()),
                ("#", _) if is_for_tests(&tokens[at..]) => tests_end = end_of_item(tokens, at),
                ("use", after) if after != "<" => at = tree(tokens, at + 1, &[], &mut found),
                (name, "::") if is_name(name) => {
                    let mut path = vec![name.to_owned()];
                    while let [_, mark, name, ..] = &tokens[at..]
                        && mark == "::"
                        && is_name(name)
                    {
                        path.push(name.clone());
                        at += 2;
                    }
                    found.push((path, None));
                }
                _ => {}
            }
            let within = &open[open.len() - 1];
            // `pub use` and `pub(…) use`.
            let is_public = start > 0 && tokens[start] == "use" && ["pub", ")"].contains(&&*tokens[start - 1]);
            let is_test = is_test_file || start < tests_end;
            for (path, bound) in found {
                if let Some(bound) = bound {
                    self.modules.entry(within.clone()).or_default().bound.insert(bound, path.clone());
                }
                uses.push(Use { within: within.clone(), path, is_test, is_public });
            }
            at += 1;
        }
        self.files.push(File { name: name.to_owned(), module, uses });
    }

    /// The files that a path leads through; the last one defines what it names.
    fn trail(&self, within: &[String], path: &[String], depth: usize) -> Vec<usize> {
        let mut module = within.to_vec();
        let mut trail = Vec::new();
        for (at, name) in path.iter().enumerate() {
            let file = self.modules[&module].file;
            match &**name {
                "crate" | "evenkeel" if at == 0 => module.clear(),
                "self" => {}
                "super" => drop(module.pop()),
                name => {
                    let inner = [&module[..], &[name.to_owned()]].concat();
                    let bound = self.modules[&module].bound.get(name);
                    if let Some(names) = self.modules.get(&inner) {
                        trail.push(names.file);
                        module = inner;
                    } else if let Some(bound) = bound.filter(|_| depth < 8) {
                        let path = [bound, &path[at + 1..]].concat();
                        trail.extend(self.trail(&module, &path, depth + 1));
                        return trail;
                    } else {
                        // In this file, or where there is no such path, of another crate.
                        trail.extend((at > 0).then_some(file));
                        return trail;
                    }
                }
            }
        }
        trail.push(self.modules[&module].file);
        trail
    }

    /// Each file with each that it uses, names on the way there too.
    pub fn uses(&self) -> BTreeSet<(&str, &str)> {
        let uses = self.files.iter().flat_map(|file| file.uses.iter().map(move |using| (file, using)));
        let named = uses.flat_map(|(file, using)| {
            self.trail(&using.within, &using.path, 0)
                .into_iter()
                .map(move |used| (&*file.name, &*self.files[used].name))
        });
        named.filter(|(file, used)| file != used).collect()
    }

    /// Files that use each other, directly or through others, in groups. A file may use what the
    /// modules around it define, and those it, and what is only used in tests does not count.
    pub fn circles(&self) -> Vec<Vec<&str>> {
        let mut arrows = vec![BTreeSet::new(); self.files.len()];
        for (at, file) in self.files.iter().enumerate() {
            for using in file.uses.iter().filter(|using| !using.is_test) {
                let Some(used) = self.trail(&using.within, &using.path, 0).pop() else { continue };
                let module = &self.files[used].module;
                let is_around = file.module.starts_with(module);
                let is_shown = using.is_public && module.starts_with(&file.module);
                if !is_around && !is_shown {
                    arrows[at].insert(used);
                }
            }
        }
        let reached: Vec<BTreeSet<usize>> = (0..arrows.len())
            .map(|from| {
                let (mut reached, mut open) = (BTreeSet::new(), vec![from]);
                while let Some(at) = open.pop() {
                    open.extend(arrows[at].iter().filter(|used| reached.insert(**used)));
                }
                reached
            })
            .collect();
        let together = |at: usize| -> Vec<usize> {
            reached[at].iter().copied().filter(|other| reached[*other].contains(&at)).collect()
        };
        let groups: BTreeSet<_> = (0..arrows.len()).map(together).collect();
        let names = |group: &Vec<usize>| group.iter().map(|at| &*self.files[*at].name).collect();
        groups.iter().filter(|group| !group.is_empty()).map(names).collect()
    }
}

fn is_name(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// The words and marks of a text, without comments and literals. `::` is one mark.
pub fn tokens(text: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let word = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        let raw = rest.trim_start_matches(['b', 'c']).strip_prefix('r');
        let raw = raw.filter(|raw| raw.trim_start_matches('#').starts_with('"'));
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            comment(rest)
        } else if let Some(raw) = raw {
            let end = format!("\"{}", "#".repeat(raw.find('"').unwrap()));
            let body = rest.find('"').unwrap() + 1;
            rest[body..].find(&end).map_or(rest.len(), |at| body + at + end.len())
        } else if first == '"' {
            quoted(rest, '"')
        } else if first == '\'' {
            // A lifetime has no second quote.
            let is_character = rest[1..].starts_with('\\') || rest.chars().nth(2) == Some('\'');
            if is_character { quoted(rest, '\'') } else { 1 }
        } else {
            let length = if rest.starts_with("::") { 2 } else { word.max(first.len_utf8()) };
            tokens.extend((!first.is_whitespace()).then(|| rest[..length].to_owned()));
            length
        };
        rest = &rest[length..];
    }
    tokens
}

/// The length of a block comment and those within.
fn comment(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    loop {
        match text.get(at..at + 2) {
            Some("/*") => (depth, at) = (depth + 1, at + 2),
            Some("*/") => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 || at >= text.len() {
            return at.min(text.len());
        }
    }
}

/// The length of a literal between two quotes.
fn quoted(text: &str, quote: char) -> usize {
    let mut is_escaped = false;
    let ends = |(_, c): &(usize, char)| {
        let ends = *c == quote && !is_escaped;
        is_escaped = *c == '\\' && !is_escaped;
        ends
    };
    text.char_indices().skip(1).find(ends).map_or(text.len(), |(at, _)| at + 1)
}

/// Adds the paths of a `use` from `at` on, each with the name that it binds, and gives the place of its last token.
fn tree(tokens: &[String], mut at: usize, before: &[String], found: &mut Vec<(Vec<String>, Option<String>)>) -> usize {
    let mut path = before.to_vec();
    while let Some(token) = tokens.get(at) {
        match &**token {
            "::" | "$" => {}
            "{" => {
                while tokens.get(at).is_some_and(|token| token != "}") {
                    at = tree(tokens, at + 1, &path, found);
                }
                return at + 1;
            }
            "}" | "," | ";" => break,
            "as" => {
                let name = tokens[at + 1].clone();
                found.push((path, Some(name)));
                return at + 2;
            }
            "*" => {
                found.push((path, None));
                return at + 1;
            }
            name => path.push(name.to_owned()),
        }
        at += 1;
    }
    if path.last().is_some_and(|last| last == "self") {
        path.pop();
    }
    if path.len() > before.len() || tokens[at - 1] == "self" {
        let name = path.last().cloned();
        found.push((path, name));
    }
    at
}

/// Whether an attribute is one that leaves its item out of all but tests.
fn is_for_tests(tokens: &[String]) -> bool {
    let end = tokens.iter().position(|token| token == "]").unwrap_or(0);
    let attribute = &tokens[..end];
    let has = |word: &str| attribute.iter().any(|token| token == word);
    attribute.get(2).is_some_and(|token| token == "cfg") && has("test") && !has("not")
}

/// Behind the item whose attributes begin at `at`.
fn end_of_item(tokens: &[String], at: usize) -> usize {
    let mut depth = 0;
    for (end, token) in tokens.iter().enumerate().skip(at) {
        match &**token {
            "{" => depth += 1,
            "}" if depth <= 1 => return end,
            "}" => depth -= 1,
            ";" if depth == 0 => return end,
            _ => {}
        }
    }
    tokens.len()
}
