//! The stack machine: one opcode after the other, without recursion.

use std::collections::HashMap;

use super::{Class, Fault, Item, Object, Pickle, Span, Unlisted};

type Outcome<T = ()> = Result<T, Fault>;

/// Containers and instances that any pickle may hold.
const FREE_OBJECTS: usize = 1 << 17;
/// The fewest bytes that each of the others takes.
const BYTES_OF_OBJECT: usize = 3;

/// Reads the pickle that `input` begins with; the value and how many bytes it took.
///
/// # Errors
/// What is damaged or refused, and where.
pub(in crate::torch) fn load(input: &[u8], unlisted: Unlisted) -> Outcome<(Pickle<'_>, usize)> {
    if u32::try_from(input.len()).is_err() {
        return Err(Fault::refused(0, "a pickle of 4 GiB or more"));
    }
    let mut machine = Machine { input, unlisted, ..Machine::default() };
    while !machine.step()? {}
    let root = machine.pop()?;
    let taken = machine.at;
    Ok((Pickle { input, objects: machine.objects, root }, taken))
}

#[derive(Default)]
struct Machine<'p> {
    input: &'p [u8],
    unlisted: Unlisted,
    at: usize,
    /// Where the running opcode begins.
    op_at: usize,
    stack: Vec<Item>,
    marks: Vec<usize>,
    objects: Vec<Object>,
    memo: Memo,
    /// Values and bytes that were copied out of others. A pickle that makes copies of copies is a bomb.
    copied: usize,
}

/// What was put aside. Numbers normally count up; those that jump ahead cost one entry, not all in between.
#[derive(Default)]
struct Memo {
    dense: Vec<Item>,
    sparse: HashMap<u32, Item>,
}

impl Memo {
    fn put(&mut self, nth: u32, item: Item) {
        match self.dense.len().cmp(&(nth as usize)) {
            std::cmp::Ordering::Less => {
                self.sparse.insert(nth, item);
            }
            std::cmp::Ordering::Equal => self.dense.push(item),
            std::cmp::Ordering::Greater => self.dense[nth as usize] = item,
        }
    }

    fn get(&self, nth: u32) -> Option<Item> {
        self.dense.get(nth as usize).or_else(|| self.sparse.get(&nth)).copied()
    }
}

impl<'p> Machine<'p> {
    /// Runs one opcode; true at the last.
    fn step(&mut self) -> Outcome<bool> {
        self.op_at = self.at;
        match self.byte()? {
            b'.' => return Ok(true),
            0x80 => self.protocol()?,
            0x95 => self.frame()?,
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            op => {
                let done = self.scalar(op)? || self.text(op)? || self.container(op)? || self.class(op)?;
                if !done && !self.memo(op)? {
                    return Err(self.unknown(op));
                }
            }
        }
        Ok(false)
    }

    fn unknown(&self, op: u8) -> Fault {
        let shown = if op.is_ascii_graphic() { format!(" ({:?})", op as char) } else { String::new() };
        Fault::refused(self.op_at, format!("pickle opcode 0x{op:02x}{shown}, which torch does not write"))
    }

    fn protocol(&mut self) -> Outcome {
        match self.byte()? {
            2..=5 => Ok(()),
            other => Err(Fault::refused(self.op_at, format!("pickle protocol {other}; read are 2 to 5"))),
        }
    }

    /// Frames only tell a reader how much to buffer; one that ends behind the input lies.
    fn frame(&mut self) -> Outcome {
        let len = self.u64()?;
        if len > (self.input.len() - self.at) as u64 {
            return Err(
                self.damaged(format!("a frame of {len} bytes where {} are left", self.input.len() - self.at))
            );
        }
        Ok(())
    }

    fn scalar(&mut self, op: u8) -> Outcome<bool> {
        let item = match op {
            b'N' => Item::None,
            0x88 => Item::Bool(true),
            0x89 => Item::Bool(false),
            b'J' => Item::Int(i64::from(i32::from_le_bytes(self.array()?))),
            b'K' => Item::Int(i64::from(self.byte()?)),
            b'M' => Item::Int(i64::from(u16::from_le_bytes(self.array()?))),
            b'G' => Item::Float(f64::from_be_bytes(self.array()?)),
            0x8a => {
                let len = self.byte()? as usize;
                self.long(len)?
            }
            0x8b => {
                let len = self.u32()? as usize;
                self.long(len)?
            }
            _ => return Ok(false),
        };
        self.stack.push(item);
        Ok(true)
    }

    /// A little-endian two's complement integer of any length.
    fn long(&mut self, len: usize) -> Outcome<Item> {
        let span = self.take(len)?;
        let bytes = &self.input[span.start as usize..span.end as usize];
        let negative = bytes.last().is_some_and(|last| *last & 0x80 != 0);
        let fill = if negative { 0xff } else { 0 };
        let (low, high) = bytes.split_at(bytes.len().min(8));
        let mut word = [fill; 8];
        word[..low.len()].copy_from_slice(low);
        let fits = high.iter().all(|byte| *byte == fill) && (high.is_empty() || (word[7] ^ fill) & 0x80 == 0);
        Ok(if fits { Item::Int(i64::from_le_bytes(word)) } else { Item::BigInt(span) })
    }

    fn text(&mut self, op: u8) -> Outcome<bool> {
        let len = match op {
            0x8c | b'C' | b'U' => u64::from(self.byte()?),
            b'X' | b'B' | b'T' => u64::from(self.u32()?),
            0x8d | 0x8e | 0x96 => self.u64()?,
            _ => return Ok(false),
        };
        let len = usize::try_from(len).map_err(|_| self.damaged("a length that no memory holds"))?;
        let span = self.take(len)?;
        let bytes = &self.input[span.start as usize..span.end as usize];
        let is_utf8 = std::str::from_utf8(bytes).is_ok();
        let item = match op {
            0x8c | b'X' | 0x8d if !is_utf8 => return Err(self.damaged("text that is not UTF-8")),
            0x8c | b'X' | 0x8d => Item::Str(span),
            // Python 2's str is text where it can be.
            b'U' | b'T' if is_utf8 => Item::Str(span),
            _ => Item::Bytes(span),
        };
        self.stack.push(item);
        Ok(true)
    }

    fn container(&mut self, op: u8) -> Outcome<bool> {
        match op {
            b')' => self.make(Object::Tuple(Vec::new()))?,
            b']' => self.make(Object::List(Vec::new()))?,
            b'}' => self.make(Object::Dict(Vec::new()))?,
            0x8f => self.make(Object::Set(Vec::new()))?,
            0x85..=0x87 => {
                let items = self.pop_many(op as usize - 0x84)?;
                self.make(Object::Tuple(items))?;
            }
            b't' => {
                let items = self.pop_mark()?;
                self.make(Object::Tuple(items))?;
            }
            b'l' => {
                let items = self.pop_mark()?;
                self.make(Object::List(items))?;
            }
            0x91 => {
                let items = self.pop_mark()?;
                self.make(Object::Set(items))?;
            }
            b'd' => {
                let items = self.pop_mark()?;
                let entries = self.pairs(items)?;
                self.make(Object::Dict(entries))?;
            }
            b'a' => {
                let item = self.pop()?;
                self.extend(vec![item])?;
            }
            b'e' | 0x90 => {
                let items = self.pop_mark()?;
                self.extend(items)?;
            }
            b's' => {
                let items = self.pop_many(2)?;
                self.set_items(items)?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.set_items(items)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn class(&mut self, op: u8) -> Outcome<bool> {
        match op {
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.find_class(module, name)?;
            }
            0x93 => {
                let names = self.pop_many(2)?;
                let (module, name) = (self.str_of(names[0])?, self.str_of(names[1])?);
                self.find_class(module, name)?;
            }
            b'R' | 0x81 => {
                let call = self.pop_many(2)?;
                self.call(call[0], call[1])?;
            }
            // Keyword arguments: no class on the list takes any.
            0x92 => {
                let call = self.pop_many(3)?;
                match self.object_of(call[2]) {
                    _ if self.callee(call[0]) == Some(Class::Opaque) => self.call(call[0], call[1])?,
                    Some(Object::Dict(entries)) if entries.is_empty() => self.call(call[0], call[1])?,
                    _ => return Err(Fault::refused(self.op_at, "a class called with keyword arguments")),
                }
            }
            b'b' => self.build()?,
            b'Q' => {
                let id = self.pop()?;
                self.make(Object::Persistent(id))?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn memo(&mut self, op: u8) -> Outcome<bool> {
        match op {
            0x94 => {
                let (nth, top) = (self.memo.dense.len() + self.memo.sparse.len(), self.top()?);
                self.memo.put(nth as u32, top);
            }
            b'q' | b'r' => {
                let nth = if op == b'q' { u32::from(self.byte()?) } else { self.u32()? };
                let top = self.top()?;
                self.memo.put(nth, top);
            }
            b'h' | b'j' => {
                let nth = if op == b'h' { u32::from(self.byte()?) } else { self.u32()? };
                let item =
                    self.memo.get(nth).ok_or_else(|| self.damaged(format!("memo {nth}, which is empty")))?;
                self.stack.push(item);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn find_class(&mut self, module: &str, name: &str) -> Outcome {
        let is_opaque = self.unlisted == Unlisted::Opaque;
        let class = Class::find(module, name).or(is_opaque.then_some(Class::Opaque));
        let refuse = || {
            Fault::refused(self.op_at, format!("the class {module:.80}.{name:.80}, which is not on the list"))
        };
        let class = class.ok_or_else(refuse)?;
        self.stack.push(Item::Class(class));
        Ok(())
    }

    /// The class that is called; what an opaque one made may be called as well.
    fn callee(&self, item: Item) -> Option<Class> {
        match (item, self.object_of(item)) {
            (Item::Class(class), _) => Some(class),
            (_, Some(Object::Made { class: Class::Opaque, .. })) => Some(Class::Opaque),
            _ => None,
        }
    }

    /// What a class makes of its arguments: containers as such, the rest as a record of the call.
    fn call(&mut self, callee: Item, arguments: Item) -> Outcome {
        let Some(class) = self.callee(callee) else {
            return Err(self.damaged("a call of something that is no class"));
        };
        let Some(Object::Tuple(given)) = self.object_of(arguments) else {
            return Err(self.damaged("arguments that are no tuple"));
        };
        // No listed class that is made here takes more than two.
        let given: Vec<Item> = given.iter().take(3).copied().collect();
        let object = match (class, &given[..]) {
            (Class::OrderedDict | Class::Dict | Class::Counter, []) | (Class::DefaultDict, [] | [_]) => {
                Object::Dict(Vec::new())
            }
            (Class::OrderedDict | Class::Dict | Class::Counter, [entries]) => {
                self.charge(*entries)?;
                Object::Dict(self.entries_of(*entries)?)
            }
            (Class::List, []) => Object::List(Vec::new()),
            (Class::Tuple, []) => Object::Tuple(Vec::new()),
            (Class::Set | Class::FrozenSet, []) => Object::Set(Vec::new()),
            (Class::Set | Class::FrozenSet, [items]) => {
                self.charge(*items)?;
                Object::Set(self.sequence_of(*items)?)
            }
            (Class::Bytes | Class::ByteArray, []) => Object::Bytes(Vec::new()),
            (Class::Bytes | Class::ByteArray, [bytes]) => {
                self.charge(*bytes)?;
                Object::Bytes(self.bytes_of(*bytes)?)
            }
            (Class::ByteArray, [text, encoding]) | (Class::Encode, [text, encoding]) => {
                self.charge(*text)?;
                Object::Bytes(self.encode(*text, *encoding)?)
            }
            // Python 3.11.2 and its like write a member as getattr(enumeration, name), others as enumeration(value).
            (
                Class::GetAttr,
                [Item::Class(class @ (Class::MemFormatEncoding | Class::Opaque)), Item::Str(_)],
            ) => Object::Made { class: *class, arguments, state: Item::None },
            (Class::GetAttr, _) => {
                return Err(Fault::refused(
                    self.op_at,
                    "getattr of anything but the member of an enumeration",
                ));
            }
            (class, _) => Object::Made { class, arguments, state: Item::None },
        };
        self.make(object)
    }

    /// Counts what a copy of `item` costs.
    fn charge(&mut self, item: Item) -> Outcome {
        let cost = match (item, self.object_of(item)) {
            (Item::Str(span) | Item::Bytes(span), _) => (span.end - span.start) as usize,
            (_, Some(Object::List(items) | Object::Tuple(items) | Object::Set(items))) => items.len(),
            (_, Some(Object::Dict(entries))) => entries.len(),
            (_, Some(Object::Bytes(bytes))) => bytes.len(),
            _ => 0,
        };
        self.copied = self.copied.saturating_add(cost);
        if self.copied > 4 * self.input.len() {
            return Err(Fault::refused(self.op_at, "copies of copies, more than the pickle is long"));
        }
        Ok(())
    }

    /// Gives an instance its state. A dict's attributes, such as the `_metadata` of a module's state dict, are dropped.
    fn build(&mut self) -> Outcome {
        let given = self.pop()?;
        let Item::Object(nth) = self.top()? else {
            return Err(self.damaged("state for something that has none"));
        };
        match &mut self.objects[nth as usize] {
            Object::Made { state, .. } => *state = given,
            Object::Dict(_) => {}
            _ => return Err(self.damaged("state for something that has none")),
        }
        Ok(())
    }

    /// Protocol 2 writes bytes as text in Latin-1.
    fn encode(&self, text: Item, encoding: Item) -> Outcome<Vec<u8>> {
        let (text, encoding) = (self.str_of(text)?, self.str_of(encoding)?);
        if !matches!(encoding, "latin1" | "latin-1" | "iso-8859-1") {
            return Err(Fault::refused(self.op_at, format!("bytes encoded as {encoding:.40}")));
        }
        let bytes = text.chars().map(|c| u8::try_from(u32::from(c))).collect::<Result<Vec<u8>, _>>();
        bytes.map_err(|_| self.damaged("text beyond Latin-1 as bytes"))
    }

    fn bytes_of(&self, item: Item) -> Outcome<Vec<u8>> {
        match (item, self.object_of(item)) {
            (Item::Bytes(span), _) => Ok(self.input[span.start as usize..span.end as usize].to_vec()),
            (_, Some(Object::Bytes(bytes))) => Ok(bytes.clone()),
            (_, Some(Object::List(items))) => {
                let byte = |item: &Item| match item {
                    Item::Int(int) => u8::try_from(*int).ok(),
                    _ => None,
                };
                items
                    .iter()
                    .map(byte)
                    .collect::<Option<_>>()
                    .ok_or_else(|| self.damaged("bytes of other things"))
            }
            _ => Err(self.damaged("bytes of other things")),
        }
    }

    fn sequence_of(&self, item: Item) -> Outcome<Vec<Item>> {
        match self.object_of(item) {
            Some(Object::List(items) | Object::Tuple(items) | Object::Set(items)) => Ok(items.clone()),
            _ => Err(self.damaged("a set of something that is no list")),
        }
    }

    fn entries_of(&self, item: Item) -> Outcome<Vec<(Item, Item)>> {
        let pair = |item: &Item| match self.object_of(*item) {
            Some(Object::List(pair) | Object::Tuple(pair)) if pair.len() == 2 => Some((pair[0], pair[1])),
            _ => None,
        };
        let entries = match self.object_of(item) {
            Some(Object::Dict(entries)) => Some(entries.clone()),
            Some(Object::List(pairs) | Object::Tuple(pairs)) => pairs.iter().map(pair).collect(),
            _ => None,
        };
        entries.ok_or_else(|| self.damaged("a dict of something that has no pairs"))
    }

    fn extend(&mut self, new: Vec<Item>) -> Outcome {
        let Item::Object(nth) = self.top()? else {
            return Err(self.damaged("items for something that is no list or set"));
        };
        match &mut self.objects[nth as usize] {
            Object::List(items) | Object::Set(items) => items.extend(new),
            Object::Made { class: Class::Opaque, .. } => {}
            _ => return Err(self.damaged("items for something that is no list or set")),
        }
        Ok(())
    }

    fn set_items(&mut self, new: Vec<Item>) -> Outcome {
        let new = self.pairs(new)?;
        let Item::Object(nth) = self.top()? else {
            return Err(self.damaged("entries for something that is no dict"));
        };
        match &mut self.objects[nth as usize] {
            Object::Dict(entries) => entries.extend(new),
            Object::Made { class: Class::Opaque, .. } => {}
            _ => return Err(self.damaged("entries for something that is no dict")),
        }
        Ok(())
    }

    fn pairs(&self, items: Vec<Item>) -> Outcome<Vec<(Item, Item)>> {
        if !items.len().is_multiple_of(2) {
            return Err(self.damaged("a key without a value"));
        }
        Ok(items.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
    }

    fn make(&mut self, object: Object) -> Outcome {
        // Torch spends many bytes on an object, with its name, its place in the memo or what it holds. One byte each
        // is a bomb that takes a hundred times its length.
        if self.objects.len() > FREE_OBJECTS + self.input.len() / BYTES_OF_OBJECT {
            return Err(Fault::refused(self.op_at, "more containers than a pickle of that length holds"));
        }
        self.stack.push(Item::Object(self.objects.len() as u32));
        self.objects.push(object);
        Ok(())
    }

    fn object_of(&self, item: Item) -> Option<&Object> {
        match item {
            Item::Object(nth) => self.objects.get(nth as usize),
            _ => None,
        }
    }

    fn str_of(&self, item: Item) -> Outcome<&'p str> {
        match item {
            Item::Str(span) => std::str::from_utf8(&self.input[span.start as usize..span.end as usize]).ok(),
            _ => None,
        }
        .ok_or_else(|| self.damaged("something else in the place of text"))
    }

    fn top(&self) -> Outcome<Item> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack
            .get(floor..)
            .and_then(<[Item]>::last)
            .copied()
            .ok_or_else(|| self.damaged("an empty stack"))
    }

    fn pop(&mut self) -> Outcome<Item> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_many(&mut self, count: usize) -> Outcome<Vec<Item>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len().checked_sub(count) {
            Some(start) if start >= floor => Ok(self.stack.split_off(start)),
            _ => Err(self.damaged("an empty stack")),
        }
    }

    fn pop_mark(&mut self) -> Outcome<Vec<Item>> {
        let floor = self.marks.pop().ok_or_else(|| self.damaged("an end without a mark"))?;
        Ok(self.stack.split_off(floor))
    }

    fn line(&mut self) -> Outcome<&'p str> {
        let rest = &self.input[self.at..];
        let len = rest
            .iter()
            .position(|byte| *byte == b'\n')
            .ok_or_else(|| self.damaged("a name without an end"))?;
        self.at += len + 1;
        std::str::from_utf8(&rest[..len]).map_err(|_| self.damaged("a name that is not UTF-8"))
    }

    fn take(&mut self, len: usize) -> Outcome<Span> {
        let left = self.input.len() - self.at;
        if len > left {
            return Err(self.damaged(format!("{len} bytes where {left} are left")));
        }
        let start = self.at as u32;
        self.at += len;
        Ok(Span { start, end: self.at as u32 })
    }

    fn array<const N: usize>(&mut self) -> Outcome<[u8; N]> {
        let span = self.take(N)?;
        let mut array = [0; N];
        array.copy_from_slice(&self.input[span.start as usize..span.end as usize]);
        Ok(array)
    }

    fn byte(&mut self) -> Outcome<u8> {
        self.array().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Outcome<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Outcome<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn damaged(&self, what: impl Into<String>) -> Fault {
        Fault::damaged(self.op_at, what)
    }
}
