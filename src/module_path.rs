//! Dotted module names (`model.layers.7.self_attn`) and how they contain each other.

/// Whether the module `prefix` is `path` or contains it: equal up to a dot
/// boundary, so that `model.layers.1` does not contain `model.layers.10`. The
/// empty prefix is the whole model.
pub fn contains(prefix: &str, path: &str) -> bool {
    prefix.is_empty() || path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Of `prefixes`, the index of the longest that contains `path`.
pub fn longest_prefix<'a>(prefixes: impl IntoIterator<Item = &'a str>, path: &str) -> Option<usize> {
    prefixes
        .into_iter()
        .enumerate()
        .filter(|(_, prefix)| contains(prefix, path))
        .max_by_key(|(_, prefix)| prefix.len())
        .map(|(index, _)| index)
}

/// `model.layers.0-19` as (`model.layers`, 0, 19); `None` where the last name is no such range.
pub fn block_range(path: &str) -> Option<(&str, usize, usize)> {
    let (parent, last) = path.rsplit_once('.')?;
    let (first, end) = last.split_once('-')?;
    Some((parent, first.parse().ok()?, end.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_at_a_dot() {
        assert!(contains("model.layers.1", "model.layers.1"));
        assert!(contains("model.layers.1", "model.layers.1.mlp.up_proj"));
        assert!(!contains("model.layers.1", "model.layers.10"));
        assert!(contains("", "lm_head"));
        assert!(!contains("model.", "model.norm"));
    }

    #[test]
    fn the_longest_prefix_wins() {
        let prefixes = ["", "model", "model.layers.1", "model.layers"];
        assert_eq!(longest_prefix(prefixes, "model.layers.1.mlp"), Some(2));
        assert_eq!(longest_prefix(prefixes, "model.layers.10"), Some(3));
        assert_eq!(longest_prefix(prefixes, "lm_head"), Some(0));
        assert_eq!(longest_prefix(["model"], "lm_head"), None);
    }

    #[test]
    fn ranges_of_blocks() {
        assert_eq!(block_range("model.layers.0-19"), Some(("model.layers", 0, 19)));
        assert_eq!(block_range("model.layers.7"), None);
        assert_eq!(block_range("lm_head"), None);
    }
}
