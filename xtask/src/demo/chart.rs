//! The loss of two runs as one self-contained SVG picture.

use std::fmt::Write as _;

use super::log::{Log, Step};

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 60.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 380.0;
/// Each point is the mean of so many steps: single batches of twelve rows are noise.
const WINDOW: usize = 10;

/// Line colours by size of the world.
const COLOURS: [(usize, &str); 2] = [(3, "#d1495b"), (4, "#2a6fbb")];

/// Draws the calm run in grey, and over it the other, coloured by the size of its world.
pub(super) fn draw(calm: &Log, elastic: &Log, n_steps: u64) -> String {
    let top = calm.steps.iter().chain(&elastic.steps).map(|step| step.loss).fold(0.0, f64::max);
    let at = |step: f64, loss: f64| {
        let x = LEFT + (WIDTH - LEFT - 20.0) * step / n_steps as f64;
        (x, BOTTOM - (BOTTOM - TOP) * (loss / top).sqrt())
    };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"13\"><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    axes(&mut svg, top, n_steps, &at);
    line(&mut svg, &calm.steps, "#bbb", 5.0, &at);
    for (nth, world) in elastic.steps.chunk_by(|a, b| a.world == b.world && b.step > a.step).enumerate() {
        let colour =
            COLOURS.iter().find(|(size, _)| *size == world[0].world).map_or("#333", |(_, colour)| colour);
        line(&mut svg, world, colour, 1.8, &at);
        let (x, _) = at(world[0].step as f64, 0.0);
        let (step, size, y) = (world[0].step, world[0].world, TOP + 16.0 * nth as f64);
        let _ = writeln!(
            svg,
            "<path d=\"M{x:.1} {TOP}V{BOTTOM}\" stroke=\"{colour}\" stroke-dasharray=\"3 3\"/>"
        );
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{y}\" fill=\"{colour}\">{size} ranks from step {step}</text>",
            x + 5.0
        );
    }
    svg + "</svg>\n"
}

fn axes(svg: &mut String, top: f64, n_steps: u64, at: &impl Fn(f64, f64) -> (f64, f64)) {
    // Writing to a String cannot fail.
    let _ = writeln!(
        svg,
        "<text x=\"{LEFT}\" y=\"24\" font-size=\"16\">Loss of an elastic run (one rank killed) over that of a calm one \
         (grey), mean of {WINDOW} steps</text>"
    );
    for part in 0..=4 {
        let (loss, step) = (top * f64::from(part * part) / 16.0, n_steps as f64 * f64::from(part) / 4.0);
        let ((_, y), (x, _)) = (at(0.0, loss), at(step, 0.0));
        let _ = writeln!(svg, "<path d=\"M{LEFT} {y:.1}H{}\" stroke=\"#eee\"/>", WIDTH - 20.0);
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{loss:.3}</text>",
            LEFT - 6.0,
            y + 4.0
        );
        let _ = writeln!(
            svg,
            "<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{step:.0}</text>",
            BOTTOM + 20.0
        );
    }
}

fn line(svg: &mut String, steps: &[Step], colour: &str, width: f64, at: &impl Fn(f64, f64) -> (f64, f64)) {
    let points: Vec<String> = steps
        .chunks(WINDOW)
        .map(|window| {
            let n = window.len() as f64;
            let mean = |of: &dyn Fn(&Step) -> f64| window.iter().map(of).sum::<f64>() / n;
            let (x, y) = at(mean(&|step| step.step as f64), mean(&|step| step.loss));
            format!("{x:.1},{y:.1}")
        })
        .collect();
    let _ = writeln!(
        svg,
        "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\" points=\"{}\"/>",
        points.join(" ")
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_world_is_a_line_of_its_own_inside_the_picture() {
        let step = |step: u64, world| Step { step, loss: 1.0 / step as f64, world };
        let calm = Log { steps: (1..=100).map(|n| step(n, 4)).collect(), ..Log::default() };
        let steps = (1..=45)
            .map(|n| step(n, 4))
            .chain((41..=70).map(|n| step(n, 3)))
            .chain((71..=100).map(|n| step(n, 4)));
        let elastic = Log { steps: steps.collect(), ..Log::default() };
        let svg = draw(&calm, &elastic, 100);
        assert_eq!(svg.matches("<polyline").count(), 4);
        assert!(svg.contains("3 ranks from step 41") && svg.contains("4 ranks from step 71"));
        for points in svg.split("points=\"").skip(1) {
            for point in points.split('"').next().unwrap().split(' ') {
                let (x, y) = point.split_once(',').unwrap();
                let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
                assert!((LEFT..=WIDTH).contains(&x) && (TOP - 0.1..=BOTTOM).contains(&y), "{point}");
            }
        }
    }
}
