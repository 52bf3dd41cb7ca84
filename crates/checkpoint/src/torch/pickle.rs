//! A pickle machine that builds plain data and nothing else.
//!
//! It reads what torch writes: protocols 2 to 5, classes from one fixed list ([`Class`]), which are kept as names with
//! their arguments and never run. Anything else is refused by name. Values live in one arena and are visited by index,
//! so neither nesting nor cycles of a hostile pickle use the call stack; text and bytes stay spans of the input, so
//! lengths that lie cost nothing.

mod classes;
mod machine;
mod write;

pub(super) use classes::Class;
pub(super) use machine::load;
pub(super) use write::Writer;

/// Torch's classes have fewer attributes, and its tensors fewer dims.
const MAX_FIELDS: usize = 64;
const MAX_DIMS: usize = 64;

/// A pickle that was read: its values, borrowing text and bytes from the input.
#[derive(Debug)]
pub(super) struct Pickle<'p> {
    input: &'p [u8],
    objects: Vec<Object>,
    root: Item,
}

/// One value. Small ones are held in place, others lie in the arena.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Item {
    None,
    Bool(bool),
    Int(i64),
    /// An integer of more than 64 bits, little-endian two's complement.
    BigInt(Span),
    Float(f64),
    Str(Span),
    Bytes(Span),
    Class(Class),
    /// Position in the arena.
    Object(u32),
}

/// What becomes of classes that are not on the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Unlisted {
    /// They are refused by name.
    #[default]
    Refused,
    /// Whatever is made of them is [`Class::Opaque`]: it has no name and no contents.
    Opaque,
}

/// A range of the input. Inputs are shorter than 4 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    start: u32,
    end: u32,
}

/// A value of the arena.
#[derive(Debug)]
pub(super) enum Object {
    List(Vec<Item>),
    Tuple(Vec<Item>),
    Set(Vec<Item>),
    /// Keys as they came; a later one of equal keys holds, as in Python.
    Dict(Vec<(Item, Item)>),
    /// Bytes that the input holds only encoded.
    Bytes(Vec<u8>),
    /// What a listed class was called with, and the state it was given.
    Made {
        class: Class,
        arguments: Item,
        state: Item,
    },
    /// A reference to something outside the pickle: torch's storages.
    Persistent(Item),
}

/// Why a pickle is not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    /// Where, in bytes of the pickle.
    pub(super) at: usize,
    pub(super) what: String,
    /// Whether the pickle is well formed but says what is not read here.
    pub(super) refused: bool,
}

impl Fault {
    pub(super) fn damaged(at: usize, what: impl Into<String>) -> Self {
        Self { at, what: what.into(), refused: false }
    }

    pub(super) fn refused(at: usize, what: impl Into<String>) -> Self {
        Self { at, what: what.into(), refused: true }
    }
}

impl<'p> Pickle<'p> {
    /// The value that the pickle is.
    pub(super) fn root(&self) -> Item {
        self.root
    }

    /// The arena's value, if the item is one.
    pub(super) fn object(&self, item: Item) -> Option<&Object> {
        match item {
            Item::Object(nth) => self.objects.get(nth as usize),
            _ => None,
        }
    }

    pub(super) fn str(&self, item: Item) -> Option<&'p str> {
        match item {
            // The machine has checked the encoding of every `Str`.
            Item::Str(span) => std::str::from_utf8(self.span(span)).ok(),
            _ => None,
        }
    }

    pub(super) fn bytes(&self, item: Item) -> Option<&[u8]> {
        match (item, self.object(item)) {
            (Item::Bytes(span), _) => Some(self.span(span)),
            (_, Some(Object::Bytes(bytes))) => Some(bytes),
            _ => None,
        }
    }

    /// The items of a list, tuple, set or `torch.Size`.
    pub(super) fn items(&self, item: Item) -> Option<&[Item]> {
        match self.object(item)? {
            Object::List(items) | Object::Tuple(items) | Object::Set(items) => Some(items),
            Object::Made { class: Class::Size, arguments, .. } => match self.arguments(*arguments) {
                [only] => match self.object(*only)? {
                    Object::List(items) | Object::Tuple(items) => Some(items),
                    _ => None,
                },
                _ => None,
            },
            _ => None,
        }
    }

    pub(super) fn dict(&self, item: Item) -> Option<&[(Item, Item)]> {
        match self.object(item)? {
            Object::Dict(entries) => Some(entries),
            _ => None,
        }
    }

    /// What `class` was called with, and its state.
    pub(super) fn made(&self, item: Item, class: Class) -> Option<(&[Item], Item)> {
        match self.object(item)? {
            Object::Made { class: found, arguments, state } if *found == class => {
                Some((self.arguments(*arguments), *state))
            }
            _ => None,
        }
    }

    /// An attribute of an instance of `class`, as its state dict has it.
    pub(super) fn field(&self, instance: Item, class: Class, name: &str) -> Option<Item> {
        let (_, state) = self.made(instance, class)?;
        // Many instances may share one state: a long one would be walked again and again.
        let entries = self.dict(state).filter(|entries| entries.len() <= MAX_FIELDS)?;
        entries.iter().rev().find(|(key, _)| self.str(*key) == Some(name)).map(|(_, value)| *value)
    }

    /// Non-negative integers: a shape, offsets or strides.
    pub(super) fn sizes(&self, item: Item) -> Option<Vec<usize>> {
        let items = self.items(item).filter(|items| items.len() <= MAX_DIMS)?;
        items.iter().map(|item| self.size(*item)).collect()
    }

    /// How many bytes the pickle has, at least.
    pub(super) fn len_bytes(&self) -> usize {
        self.input.len()
    }

    pub(super) fn size(&self, item: Item) -> Option<usize> {
        match item {
            Item::Int(int) => usize::try_from(int).ok(),
            _ => None,
        }
    }

    /// The value in a few words, for messages.
    pub(super) fn describe(&self, item: Item) -> String {
        match (item, self.object(item)) {
            (Item::None, _) => "None".to_owned(),
            (Item::Bool(truth), _) => truth.to_string(),
            (Item::Int(int), _) => int.to_string(),
            (Item::BigInt(_), _) => "an integer of more than 64 bits".to_owned(),
            (Item::Float(float), _) => float.to_string(),
            (Item::Str(span), _) => format!("{:.60?}", String::from_utf8_lossy(self.span(span))),
            (Item::Class(class), _) => format!("the class {}", class.name()),
            (_, Some(Object::List(items))) => format!("a list of {}", items.len()),
            (_, Some(Object::Tuple(items))) => format!("a tuple of {}", items.len()),
            (_, Some(Object::Set(items))) => format!("a set of {}", items.len()),
            (_, Some(Object::Dict(entries))) => format!("a dict of {}", entries.len()),
            (_, Some(Object::Made { class, .. })) => class.name().to_owned(),
            (_, Some(Object::Persistent(_))) => "a persistent reference".to_owned(),
            _ => "bytes".to_owned(),
        }
    }

    fn span(&self, span: Span) -> &'p [u8] {
        &self.input[span.start as usize..span.end as usize]
    }

    /// Arguments come as a tuple.
    fn arguments(&self, item: Item) -> &[Item] {
        match self.object(item) {
            Some(Object::Tuple(items)) => items,
            _ => &[],
        }
    }
}

#[cfg(test)]
mod tests;
