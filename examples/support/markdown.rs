//! Tables in Markdown.

use std::fmt::Display;

pub fn table<T: Display>(
    head: impl IntoIterator<Item = T>,
    rows: impl IntoIterator<Item = Vec<String>>,
) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let head: Vec<String> = head.into_iter().map(|cell| cell.to_string()).collect();
    let rule = format!("|{}\n", "---|".repeat(head.len()));
    let rows: String = rows.into_iter().map(line).collect();
    format!("{}{rule}{rows}\n", line(head))
}
