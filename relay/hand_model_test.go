package relay

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// tables is what the tables hold, and a hand that reads and settles them while their
// lane is its relay's.
type tables struct {
	*rapid.T
	hand          *hand
	epoch         int64 // of the lane
	owned         bool
	last          int64
	keys          map[int64]string
	outbox        []int64
	parked        map[int64]string // the reason
	page          []*message       // read, and not admitted yet
	inFlight      []*message
	locked        []*message
	lockedRefused []verdict
	accepted      []int64        // by the broker, in order
	mayRepeat     map[int64]bool // accepted, and their rows were there when the lane was lost
}

// row returns a message as it is read.
func (s *tables) row(id int64, parked, behind bool) *message {
	m := newMessage(id, s.keys[id], fmt.Sprint("q", id%3))
	m.payload, m.parked, m.behind, m.epoch = []byte{0}, parked, behind, s.epoch
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
	if s.page != nil || !s.owned {
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
	if s.page != nil || !s.owned {
		return
	}
	for id, reason := range s.parked {
		head := s.keys[id] == "" || s.parkedOf(s.keys[id])[0] == id
		if m := s.hand.byID[id]; head && reason == "retry" && (m == nil || !m.parked) {
			s.hand.admit([]*message{s.row(id, true, true)})
		}
	}
	var walked []blockedKey
	if rapid.Bool().Draw(s.T, "what is parked is looked at") {
		walked = []blockedKey{{0, "a"}, {0, "b"}}
	}
	for _, k := range s.hand.changedKeys(walked) {
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
		if !s.ours(m) {
			s.hand.drop(m)
			continue
		}
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
	s.accepts(m.id)
	s.hand.confirm([]*message{m})
}

// accepts records that the broker has a message.
func (s *tables) accepts(id int64) {
	if slices.Contains(s.accepted, id) {
		if !s.mayRepeat[id] {
			s.Fatalf("message %d is published again", id)
		}
		return
	}
	for _, before := range s.accepted {
		if key := s.keys[id]; key != "" && s.keys[before] == key && before > id {
			s.Fatalf("message %d of key %s after %d", id, key, before)
		}
	}
	s.accepted = append(s.accepted, id)
}

// ours says that the lane is still the one in which m was read.
func (s *tables) ours(m *message) bool { return s.owned && m.epoch == s.epoch }

// lose gives the lane to another, once all in flight is answered. The other publishes
// some of what there is, and parks some.
func (s *tables) lose(t *rapid.T) {
	if !s.owned {
		return
	}
	for len(s.inFlight) > 0 {
		if rapid.Bool().Draw(s.T, "answered") {
			s.confirm(t)
		} else {
			s.unknown(t)
		}
	}
	s.owned = false
	s.epoch++
	for _, id := range s.accepted {
		s.mayRepeat[id] = true
	}
	for _, key := range []string{"", "a", "b"} {
		for rapid.Bool().Draw(s.T, "the other does something") && s.otherDoes(key) {
		}
	}
}

// otherDoes lets the other owner of the lane publish or park the first of a key.
func (s *tables) otherDoes(key string) bool {
	all := s.parkedOf(key)
	if len(all) == 0 {
		for _, id := range s.outbox {
			if s.keys[id] == key {
				all = append(all, id)
			}
		}
	}
	if len(all) == 0 {
		return false
	}
	id := all[0]
	if rapid.IntRange(0, 3).Draw(s.T, "refused") == 0 {
		s.park(id, "retry")
		return false
	}
	s.accepts(id)
	s.mayRepeat[id] = true
	if rapid.Bool().Draw(s.T, "deleted") {
		s.remove(id)
		return true
	}
	return false
}

// regain gives the lane back: all of it is read anew, once nothing of it is in the hand.
func (s *tables) regain(*rapid.T) {
	if s.owned || s.page != nil {
		return
	}
	s.hand.readEnded()
	if !s.hand.empty(0) {
		return
	}
	s.hand.startOver(func(int16) bool { return true })
	s.hand.readEnded()
	s.epoch++
	s.owned = true
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

func (s *tables) remove(id int64) {
	s.outbox = slices.DeleteFunc(s.outbox, func(o int64) bool { return o == id })
	delete(s.parked, id)
}

func (s *tables) park(id int64, reason string) {
	s.remove(id)
	s.parked[id] = reason
}

func (s *tables) delete(m *message) {
	s.remove(m.id)
	s.hand.deleted(m)
}

// unlock lets the rows go that are locked.
func (s *tables) unlock(*rapid.T) {
	for _, m := range s.locked {
		s.delete(m)
	}
	for _, v := range s.lockedRefused {
		if s.ours(v.message) {
			s.record(v)
		} else {
			s.hand.giveUp(v)
		}
	}
	s.locked, s.lockedRefused = nil, nil
}

// record parks a refused message, if the lane is still ours.
func (s *tables) record(v verdict) {
	if s.ours(v.message) {
		for _, id := range s.outbox {
			if v.reason == "blocked" && id < v.id && s.keys[id] == v.key && !slices.Contains(s.accepted, id) {
				s.Fatalf("message %d is parked before %d of its key", v.id, id)
			}
		}
		s.park(v.id, v.reason)
	}
	s.hand.recorded(v)
}

func (s *tables) keyIsLocked(key string) bool {
	return key != "" && slices.ContainsFunc(s.lockedRefused, func(v verdict) bool { return v.key == key })
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
	for _, vs := range byKey(refused) {
		if s.keyIsLocked(vs[0].key) || rapid.IntRange(0, 3).Draw(s.T, "one of their rows is locked") == 0 {
			s.lockedRefused = append(s.lockedRefused, vs...)
			continue
		}
		for _, v := range vs {
			s.record(v)
		}
	}
}

// Whatever happens in whatever order, the messages of a key go out one after another, in
// order, each is accepted once, but for those the rows of which another owner of the lane
// may find, and in the end nothing is left, in the tables or in the hand.
func TestHandKeepsOrderAndForgetsNothing(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		s := &tables{
			T: t, hand: newHand(), epoch: 1, owned: true,
			keys: make(map[int64]string), parked: make(map[int64]string), mayRepeat: make(map[int64]bool),
		}
		t.Repeat(map[string]func(*rapid.T){
			"write": s.write, "read": s.read, "admit": s.admit, "read parked": s.readParked,
			"take": s.take, "confirm": s.confirm, "refuse": s.refuse, "unknown": s.unknown, "settle": s.settle, "unlock": s.unlock,
			"lose": s.lose, "regain": s.regain,
		})
		for range 4*int(s.last) + 4 {
			s.admit(t)
			s.regain(t)
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
