//! Dotted module names (`model.layers.7.self_attn`) and how they contain each other.

/// Whether the module `prefix` is `path` or contains it: equal up to a dot
/// boundary, so that `model.layers.1` does not contain `model.layers.10`. The
/// empty prefix is the whole model.
pub fn contains(prefix: &str, path: &str) -> bool {
    prefix.is_empty() || path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// `path` and all that contain it, the longest first, the whole model last.
pub fn and_above(path: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(path), |path| {
        let path: &str = path;
        (!path.is_empty()).then(|| path.rfind('.').map_or("", |end| &path[..end]))
    })
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
    fn what_is_above_contains_a_path() {
        let all: Vec<_> = and_above("model.layers.10").collect();
        assert_eq!(all, ["model.layers.10", "model.layers", "model", ""]);
        assert!(all.iter().all(|above| contains(above, "model.layers.10")));
        assert_eq!(and_above("").collect::<Vec<_>>(), [""]);
    }

    #[test]
    fn ranges_of_blocks() {
        assert_eq!(block_range("model.layers.0-19"), Some(("model.layers", 0, 19)));
        assert_eq!(block_range("model.layers.7"), None);
        assert_eq!(block_range("lm_head"), None);
    }
}
