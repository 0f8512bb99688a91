package relay

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// tables is what the tables hold, and a hand that reads and settles them.
type tables struct {
	*rapid.T
	hand     *hand
	last     int64
	keys     map[int64]string
	outbox   []int64
	parked   map[int64]string // the reason
	page     []*message       // read, and not admitted yet
	inFlight []*message
	locked   []*message
	accepted []int64 // by the broker, in order
}

// row returns a message as it is read.
func (s *tables) row(id int64, parked, behind bool) *message {
	m := newMessage(id, s.keys[id], fmt.Sprint("q", id%3))
	m.payload, m.parked, m.behind = []byte{0}, parked, behind
	return m
}

func (s *tables) parkedOf(key string) (ids []int64) {
	for id := range s.parked {
		if s.keys[id] == key {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

func (s *tables) write(*rapid.T) {
	s.last++
	s.keys[s.last] = rapid.SampledFrom([]string{"", "a", "b"}).Draw(s.T, "key")
	s.outbox = append(s.outbox, s.last)
}

// read takes a page; other things happen before it is admitted.
func (s *tables) read(*rapid.T) {
	if s.page != nil {
		return
	}
	for _, id := range s.outbox {
		s.page = append(s.page, s.row(id, false, s.keys[id] != "" && len(s.parkedOf(s.keys[id])) > 0))
	}
}

func (s *tables) admit(*rapid.T) {
	s.hand.admit(s.page)
	s.page = nil
	s.hand.readEnded()
}

// readParked reads heads that wait for a time, and then those of keys that have changed.
func (s *tables) readParked(*rapid.T) {
	if s.page != nil {
		return
	}
	for id, reason := range s.parked {
		head := s.keys[id] == "" || s.parkedOf(s.keys[id])[0] == id
		if m := s.hand.byID[id]; head && reason == "retry" && (m == nil || !m.parked) {
			s.hand.admit([]*message{s.row(id, true, true)})
		}
	}
	for _, k := range s.hand.changedKeys(nil) {
		s.hand.readEnded()
		var due []*message
		for _, id := range s.parkedOf(k.key) {
			if len(due) == 3 {
				due[2].behind = true
				break
			}
			due = append(due, s.row(id, true, false))
		}
		for _, m := range due {
			m.behind = m.behind || len(due) == 3
		}
		s.hand.admit(due)
	}
	s.hand.readEnded()
}

func (s *tables) take(*rapid.T) {
	for _, m := range s.hand.take(rapid.IntRange(1, 5).Draw(s.T, "limit")) {
		if m.key != "" && slices.ContainsFunc(s.inFlight, func(o *message) bool { return o.key == m.key }) {
			s.Fatalf("two of key %s in flight", m.key)
		}
		s.inFlight = append(s.inFlight, m)
	}
}

// answered returns one that is in flight no more.
func (s *tables) answered() *message {
	if len(s.inFlight) == 0 {
		return nil
	}
	i := rapid.IntRange(0, len(s.inFlight)-1).Draw(s.T, "which")
	m := s.inFlight[i]
	s.inFlight = slices.Delete(s.inFlight, i, i+1)
	return m
}

func (s *tables) confirm(*rapid.T) {
	if m := s.answered(); m != nil {
		s.accept(m)
	}
}

func (s *tables) accept(m *message) {
	if slices.Contains(s.accepted, m.id) {
		s.Fatalf("message %d is published again", m.id)
	}
	for _, id := range s.accepted {
		if m.key != "" && s.keys[id] == m.key && id > m.id {
			s.Fatalf("message %d of key %s after %d", m.id, m.key, id)
		}
	}
	s.accepted = append(s.accepted, m.id)
	s.hand.confirm([]*message{m})
}

func (s *tables) refuse(*rapid.T) {
	if m := s.answered(); m != nil {
		s.hand.refuse(verdict{message: m, reason: "retry"})
	}
}

func (s *tables) unknown(*rapid.T) {
	if m := s.answered(); m != nil {
		s.hand.retry(m)
	}
}

func (s *tables) delete(m *message) {
	s.outbox = slices.DeleteFunc(s.outbox, func(id int64) bool { return id == m.id })
	delete(s.parked, m.id)
	s.hand.deleted(m)
}

// unlock lets the rows go that are locked.
func (s *tables) unlock(*rapid.T) {
	for _, m := range s.locked {
		s.delete(m)
	}
	s.locked = nil
}

func (s *tables) settle(*rapid.T) {
	confirmed, refused := s.hand.toSettle(rapid.IntRange(1, 4).Draw(s.T, "most"))
	for _, m := range confirmed {
		if rapid.Bool().Draw(s.T, "its row is locked") {
			s.hand.putAside(m)
			s.locked = append(s.locked, m)
		} else {
			s.delete(m)
		}
	}
	for _, v := range refused {
		for _, id := range s.outbox {
			if v.reason == "blocked" && id < v.id && s.keys[id] == v.key && !slices.Contains(s.accepted, id) {
				s.Fatalf("message %d is parked before %d of its key", v.id, id)
			}
		}
		s.outbox = slices.DeleteFunc(s.outbox, func(id int64) bool { return id == v.id })
		s.parked[v.id] = v.reason
		s.hand.recorded(v)
	}
}

// Whatever happens in whatever order, the messages of a key go out one after another, in
// order, each is accepted once, and in the end nothing is left, in the tables or in the
// hand.
func TestHandKeepsOrderAndForgetsNothing(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		s := &tables{T: t, hand: newHand(), keys: make(map[int64]string), parked: make(map[int64]string)}
		t.Repeat(map[string]func(*rapid.T){
			"write": s.write, "read": s.read, "admit": s.admit, "read parked": s.readParked,
			"take": s.take, "confirm": s.confirm, "refuse": s.refuse, "unknown": s.unknown, "settle": s.settle, "unlock": s.unlock,
		})
		for range 4*int(s.last) + 4 {
			s.admit(t)
			s.readParked(t)
			s.read(t)
			s.admit(t)
			s.take(t)
			for len(s.inFlight) > 0 {
				s.confirm(t)
			}
			s.settle(t)
			s.unlock(t)
		}
		s.hand.readEnded()
		h := s.hand
		if len(s.accepted) != int(s.last) || len(s.outbox)+len(s.parked) > 0 {
			t.Fatalf("%d of %d accepted; left: %v, %v", len(s.accepted), s.last, s.outbox, s.parked)
		}
		if n := len(h.byID) + len(h.lines) + len(h.passed) + len(h.routes) + len(h.turn) + len(h.gone) + len(h.onTrial) +
			h.bytes + h.waiting + h.waitBytes + h.inFlight + h.refusing + h.unsettled[0] + h.taken[0]; n != 0 {
			t.Errorf("left in the hand: %+v", h)
		}
	})
}
