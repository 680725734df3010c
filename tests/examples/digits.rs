//! The data that the examples ship and how they cut it.

use crate::common::tensors::CPU;
use crate::support::digits::{Batches, CLASSES, Digits};
use std::collections::BTreeSet;

#[test]
fn the_digits_are_all_there() {
    let digits = Digits::load().unwrap();
    assert_eq!(digits.len(), 1797);
    let ink: f32 = digits.images.iter().flatten().map(|v| v * 16.).sum();
    assert_eq!(ink, 561_718.);
    let classes: BTreeSet<u32> = digits.labels.iter().copied().collect();
    assert_eq!(classes.len(), CLASSES);
}

#[test]
fn a_turn_is_a_quarter_of_a_full_one() {
    let digits = Digits::load().unwrap();
    let once = digits.turned();
    assert_ne!(once.images, digits.images);
    // The top row becomes the left column, its first pixel at the bottom.
    for i in 0..8 {
        assert_eq!(once.images[5][(7 - i) * 8], digits.images[5][i]);
    }
    assert_eq!(once.turned().turned().turned().images, digits.images);
}

#[test]
fn the_split_is_disjoint_complete_and_seeded() {
    let mut digits = Digits::load().unwrap();
    // Labels that name their image.
    digits.labels = (0..1797).collect();
    let split = digits.split(3);
    let sizes = [&split.train, &split.validation, &split.test].map(Digits::len);
    assert_eq!(sizes, [1079, 359, 359]);
    let parts = [
        &split.train.labels,
        &split.validation.labels,
        &split.test.labels,
    ];
    let all: BTreeSet<u32> = parts.into_iter().flatten().copied().collect();
    assert_eq!(all.len(), 1797);
    assert_eq!(digits.split(3).test.labels, split.test.labels);
    assert_ne!(digits.split(4).test.labels, split.test.labels);
}

#[test]
fn a_pass_takes_no_image_twice() {
    let mut digits = Digits::load().unwrap();
    digits.labels = (0..1797).collect();
    let examples = digits.examples(&CPU).unwrap();
    let mut batches = Batches::new(&examples, 100, 1);
    let mut seen = BTreeSet::new();
    for _ in 0..17 {
        let (images, labels) = batches.next_batch().unwrap();
        for (image, label) in images
            .to_vec2::<f32>()
            .unwrap()
            .iter()
            .zip(labels.to_vec1::<u32>().unwrap())
        {
            assert_eq!(
                image, &digits.images[label as usize],
                "an image without its label"
            );
            assert!(seen.insert(label));
        }
    }
    assert_eq!(seen.len(), 1700);
}
