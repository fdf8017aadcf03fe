//! A plan as text, as JSON and as pictures.

mod picture;
mod report;
