//! The house rules that can be read off the sources: who uses whom, how long a file is, how many names
//! the crate root has, and that the library does not panic for its user.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Lines that a file may have.
const LONGEST: usize = 500;

/// Names that the crate root may have.
const NAMES: usize = 28;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Every Rust file of a folder, in order.
fn sources(folder: &str) -> Vec<PathBuf> {
    let (mut folders, mut files) = (vec![root().join(folder)], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            match path.extension() {
                _ if path.is_dir() => folders.push(path),
                Some(end) if end == "rs" => files.push(path),
                _ => {}
            }
        }
    }
    files.sort();
    files
}

fn name(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().display().to_string()
}

/// The source with comments, strings and characters blanked, byte for byte and line for line.
fn code(source: &str) -> String {
    let bytes = source.as_bytes();
    let find = |from: usize, end: &str| source[from..].find(end).map_or(bytes.len(), |i| from + i);
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &source[at..];
        let hashes = rest[1..].bytes().take_while(|b| *b == b'#').count();
        let end = if rest.starts_with("//") {
            find(at, "\n")
        } else if rest.starts_with("/*") {
            find(at, "*/") + 2
        } else if rest.starts_with('r') && rest[1 + hashes..].starts_with('"') && !word(bytes, at) {
            let end = format!("\"{}", "#".repeat(hashes));
            find(at + hashes + 2, &end) + end.len()
        } else if rest.starts_with('"') {
            closing(bytes, at, b'"')
        } else if rest.starts_with("'\\") {
            closing(bytes, at, b'\'')
        } else if rest.starts_with('\'') && rest[1..].chars().nth(1) == Some('\'') {
            at + rest[1..].find('\'').unwrap() + 2
        } else {
            at += rest.chars().next().map_or(1, char::len_utf8);
            continue;
        };
        let end = end.min(bytes.len());
        let blank = out[at..end].iter_mut().filter(|byte| **byte != b'\n');
        blank.for_each(|byte| *byte = b' ');
        at = end;
    }
    String::from_utf8(out).unwrap()
}

/// Whether a letter stands before `at`.
fn word(bytes: &[u8], at: usize) -> bool {
    at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_')
}

/// Behind the quote that closes the one at `open`.
fn closing(bytes: &[u8], open: usize, quote: u8) -> usize {
    let mut at = open + 1;
    while at < bytes.len() && bytes[at] != quote {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    at + 1
}

/// Behind the item at `start`: its semicolon, or the brace that closes it.
fn item_end(code: &str, start: usize) -> usize {
    let mut depth = 0;
    for (i, byte) in code.bytes().enumerate().skip(start) {
        match byte {
            b'{' => depth += 1,
            b'}' if depth == 1 => return i + 1,
            b'}' => depth -= 1,
            b';' if depth == 0 => return i + 1,
            _ => {}
        }
    }
    code.len()
}

/// Code without what is for tests alone, and the modules that are and lie in files of their own.
fn without_tests(code: &str) -> (String, Vec<String>) {
    let (mut rest, mut modules) = (code.to_string(), Vec::new());
    while let Some(start) = rest.find("#[cfg(test)]") {
        let end = item_end(&rest, start);
        let item = rest[start..end].to_string();
        if let Some((_, module)) = item.strip_suffix(';').and_then(|i| i.split_once("mod ")) {
            modules.push(module.trim().to_string());
        }
        let blank: String = item
            .chars()
            .map(|c| if c == '\n' { c } else { ' ' })
            .collect();
        rest.replace_range(start..end, &blank);
    }
    (rest, modules)
}

/// The library's files with their code, without tests.
fn library() -> Vec<(PathBuf, String)> {
    let files = sources("src").into_iter();
    let files = files.map(|path| (without_tests(&code(&read(&path))), path));
    let (mut found, mut tests) = (Vec::new(), BTreeSet::new());
    for ((code, modules), path) in files {
        let home = path.parent().unwrap();
        tests.extend(modules.iter().map(|m| home.join(m).with_extension("rs")));
        found.push((path, code));
    }
    found.retain(|(path, _)| !tests.contains(path));
    found
}

/// The module that a file of `src` is, from the root on; empty for the root.
fn module(path: &Path) -> Vec<String> {
    let inside = path.strip_prefix(root().join("src")).unwrap();
    let parts = inside.with_extension("");
    let parts = parts.iter().map(|part| part.to_str().unwrap().to_string());
    parts
        .filter(|part| part != "mod" && part != "lib")
        .collect()
}

fn identifier(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_');
    &text[..end.unwrap_or(text.len())]
}

/// How many inline modules are open at `at`.
fn inline_modules(code: &str, at: usize) -> usize {
    let mut open = Vec::new();
    for (i, byte) in code.bytes().enumerate().take(at) {
        match byte {
            b'{' => {
                let mut words = code[..i].split_whitespace().rev();
                open.push(words.nth(1) == Some("mod"));
            }
            b'}' => drop(open.pop()),
            _ => {}
        }
    }
    open.into_iter().filter(|is_module| *is_module).count()
}

/// What a module `depth` steps below the root uses of the root: line and name.
fn uses(code: &str, depth: usize) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("::") {
        let before = &code[..at];
        let start = before.rfind(|c: char| !c.is_alphanumeric() && c != '_' && c != ':');
        let path = &before[start.map_or(0, |i| i + 1)..];
        let from_root = match path {
            "crate" => true,
            supers if supers.split("::").all(|part| part == "super") => {
                supers.split("::").count() == depth + inline_modules(code, at)
            }
            _ => false,
        };
        let after = &code[at + 2..];
        if !from_root || after.starts_with("super") {
            continue;
        }
        let line = before.matches('\n').count() + 1;
        match after.strip_prefix('{') {
            None => found.push((line, identifier(after).to_string())),
            Some(list) => {
                let mut depth = 0;
                let list = list.split_inclusive([',', '{', '}']);
                for part in list {
                    if depth == 0 && !identifier(part.trim()).is_empty() {
                        found.push((line, identifier(part.trim()).to_string()));
                    }
                    match part.chars().last() {
                        Some('{') => depth += 1,
                        Some('}') if depth == 0 => break,
                        Some('}') => depth -= 1,
                        _ => {}
                    }
                }
            }
        }
    }
    found
}

/// Names of the crate root: modules under themselves, what they lend it under the module.
fn names_of_root() -> BTreeMap<String, String> {
    let lib = code(&read(&root().join("src/lib.rs")));
    let mut names = BTreeMap::new();
    for item in lib.split_inclusive([';', '}']) {
        let item = item.trim().trim_end_matches(';');
        if let Some((_, module)) = item.split_once("mod ") {
            let module = identifier(module);
            names.insert(module.to_string(), module.to_string());
        }
    }
    for (at, _) in lib.match_indices("pub use ") {
        let item = &lib[at + 8..item_after_braces(&lib, at)];
        let module = identifier(item);
        let lent = item[module.len()..].split(|c: char| !c.is_alphanumeric());
        for name in lent.filter(|name| !name.is_empty()) {
            names.insert(name.to_string(), module.to_string());
        }
    }
    names
}

fn item_after_braces(code: &str, at: usize) -> usize {
    code[at..].find(';').map_or(code.len(), |i| at + i)
}

/// The table of the architecture page: each module with what it may use, in the order of the page.
fn table() -> Vec<(String, Vec<String>)> {
    let page = read(&root().join("src/architecture.md"));
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    let quoted = |cell: &str| -> Vec<String> {
        let names = cell.split('`').skip(1).step_by(2);
        names.map(String::from).collect()
    };
    rows.map(|row| {
        let cells: Vec<&str> = row.split('|').collect();
        let module = quoted(cells[1]).remove(0);
        (module, quoted(cells[3]))
    })
    .collect()
}

/// What is wrong with a use of `used` in `module`, if anything is.
fn against_the_flow(
    table: &[(String, Vec<String>)],
    names: &BTreeMap<String, String>,
    module: &str,
    used: &str,
) -> Option<String> {
    let Some(used) = names.get(used) else {
        return Some(format!("`{used}` is no name of the crate root"));
    };
    let Some((_, may_use)) = table.iter().find(|(name, _)| name == module) else {
        return Some(format!("`{module}` is missing from src/architecture.md"));
    };
    (used != module && !may_use.contains(used))
        .then(|| format!("by src/architecture.md `{module}` may not use `{used}`"))
}

#[test]
fn modules_use_what_the_architecture_page_lets_them_use_and_nothing_else() {
    let (table, names) = (table(), names_of_root());
    let (mut wrong, mut used) = (Vec::new(), BTreeSet::new());
    for (path, code) in library() {
        let module = module(&path);
        let Some(top) = module.first() else { continue };
        if !table.iter().any(|(known, _)| known == top) {
            wrong.push(format!(
                "{}: `{top}` is missing from src/architecture.md",
                name(&path)
            ));
        }
        for (line, import) in uses(&code, module.len()) {
            if let Some(reason) = against_the_flow(&table, &names, top, &import) {
                wrong.push(format!("{}:{line}: `{import}`: {reason}", name(&path)));
            }
            used.insert((top.clone(), names.get(&import).cloned().unwrap_or_default()));
        }
    }
    for (module, may_use) in &table {
        for other in may_use {
            if !used.contains(&(module.clone(), other.clone())) {
                wrong.push(format!(
                    "src/architecture.md: `{module}` may use `{other}`, but does not"
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn the_architecture_page_lets_no_module_use_one_below_it() {
    let table = table();
    assert!(table.len() > 5, "the table was not found");
    for (row, (module, may_use)) in table.iter().enumerate() {
        for other in may_use {
            let above = table[..row].iter().any(|(name, _)| name == other);
            assert!(above, "`{module}` may use `{other}`, which is not above it");
        }
    }
    let listed: BTreeSet<&String> = table.iter().map(|(module, _)| module).collect();
    let names = names_of_root();
    for module in names.iter().filter(|(name, module)| name == module) {
        let page = ["architecture", "measurements"].contains(&module.0.as_str());
        let there = page || listed.contains(module.0);
        assert!(there, "`{}` is missing from src/architecture.md", module.0);
    }
}

#[test]
fn a_wrong_import_is_caught_and_what_only_looks_like_one_is_not() {
    let (table, names) = (table(), names_of_root());
    let caught = |module: &str, depth: usize, source: &str| -> Vec<(usize, String)> {
        let (code, _) = without_tests(&code(source));
        let uses = uses(&code, depth).into_iter();
        uses.filter(|(_, used)| against_the_flow(&table, &names, module, used).is_some())
            .collect()
    };
    let found = |line: usize, name: &str| vec![(line, name.to_string())];
    assert_eq!(
        caught("config", 2, "\nuse crate::layer::Base;"),
        found(2, "layer")
    );
    assert_eq!(
        caught(
            "rotation",
            2,
            "use super::super::{config::Map, adapter::{A, B}};"
        ),
        found(1, "adapter")
    );
    assert_eq!(caught("params", 1, "use super::file;"), found(1, "file"));
    assert_eq!(
        caught("params", 1, "mod a { use super::super::merge; }"),
        found(1, "merge")
    );
    assert_eq!(
        caught(
            "ops",
            2,
            "fn f() -> crate::Result<()> { g::<crate::Adapter>() }"
        ),
        [(1, "Result".to_string()), (1, "Adapter".to_string())]
    );
    assert_eq!(caught("file", 2, "crate::nowhere!()"), found(1, "nowhere"));
    for innocent in [
        "/// As [`Adapter`](crate::Adapter).\n// crate::merge\nuse crate::error::Error;",
        "const A: &str = \"crate::merge\"; const B: &str = r#\"\"crate::merge\"#; const C: char = '\"';",
        "#[cfg(test)]\nuse crate::merge;\n#[cfg(test)]\nmod tests {\n use crate::merge; fn f() {}\n}",
        "/* crate::merge */ use super::merge; fn f<'a>(x: &'a crate::Error) {}",
    ] {
        assert_eq!(caught("config", 2, innocent), [], "{innocent}");
    }
    assert!(against_the_flow(&table, &names, "new", "error").is_some());
}

#[test]
fn no_file_is_too_long_to_read_at_once() {
    for path in ["src", "tests", "examples", "benches"]
        .map(sources)
        .concat()
    {
        let lines = read(&path).lines().count();
        let name = name(&path);
        let fits = lines <= LONGEST;
        assert!(fits, "{name} has {lines} lines, of {LONGEST}");
    }
}

#[test]
fn the_crate_root_is_a_table_of_contents() {
    let mut names = names_of_root();
    names.remove("ops");
    let count = names.len();
    assert!(count <= NAMES, "{count} names, of {NAMES}: {names:?}");
}

#[test]
fn nothing_in_the_library_panics_without_a_proof_that_it_cannot() {
    for (path, code) in library() {
        let source = read(&path);
        let lines: Vec<&str> = source.lines().collect();
        for (at, line) in code.lines().enumerate() {
            let panics = line.contains(".unwrap()") || line.contains(".expect(");
            let proven = at > 0 && lines[at - 1].trim_start().starts_with("//");
            let place = format!("{}:{}", name(&path), at + 1);
            assert!(!panics || proven, "{place}: {}", line.trim());
        }
    }
}
