//! Placement: which group ranks share a host, and the order in which hosts carry their ranks' bytes. Pure.
//!
//! ```text
//! group ranks   0 1 2 3 4          hosts  [0 2 3] [1 4]       the first of each host leads it
//! on hosts      a b a a b          carried as  0 2 3 1 4
//! ```

/// The hosts of a group, each with its group ranks in their order, ordered by their first ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Placement {
    hosts: Vec<Vec<usize>>,
    /// This rank's host, and its place there.
    host: usize,
    place: usize,
}

impl Placement {
    /// `host_of` names the host of each group rank; `me` is this one's.
    pub(super) fn new<H: PartialEq>(host_of: &[H], me: usize) -> Placement {
        let mut hosts: Vec<Vec<usize>> = Vec::new();
        for (g, host) in host_of.iter().enumerate() {
            match hosts.iter_mut().find(|members| host_of[members[0]] == *host) {
                Some(members) => members.push(g),
                None => hosts.push(vec![g]),
            }
        }
        let mut placement = Placement { hosts, host: 0, place: 0 };
        (placement.host, placement.place) = placement.locate(me);
        placement
    }

    /// Host of a group rank, and its place there.
    pub(super) fn locate(&self, g: usize) -> (usize, usize) {
        let found = self.hosts.iter().enumerate().find_map(|(host, members)| {
            members.iter().position(|member| *member == g).map(|place| (host, place))
        });
        found.unwrap_or_default()
    }

    pub(super) fn hosts(&self) -> &[Vec<usize>] {
        &self.hosts
    }

    /// This rank's host.
    pub(super) fn host(&self) -> usize {
        self.host
    }

    /// The group ranks of this rank's host.
    pub(super) fn mates(&self) -> &[usize] {
        &self.hosts[self.host]
    }

    pub(super) fn leads(&self) -> bool {
        self.place == 0
    }

    /// All group ranks in the order in which their bytes are carried.
    pub(super) fn carried(&self) -> impl Iterator<Item = usize> {
        self.hosts.iter().flatten().copied()
    }

    /// The sum of `counts`, one a group rank, over each host.
    pub(super) fn by_host(&self, counts: &[usize]) -> Vec<usize> {
        self.hosts.iter().map(|members| members.iter().map(|g| counts[*g]).sum()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_a_host_are_carried_together_in_their_order() {
        let placement = Placement::new(&["a", "b", "a", "a", "b"], 3);
        assert_eq!(placement.hosts(), [vec![0, 2, 3], vec![1, 4]]);
        assert_eq!((placement.host(), placement.mates(), placement.leads()), (0, &[0, 2, 3][..], false));
        assert!(placement.carried().eq([0, 2, 3, 1, 4]));
        assert_eq!(placement.by_host(&[1, 10, 2, 3, 20]), [6, 30]);
        assert!(Placement::new(&["a", "b"], 1).leads());
    }
}
