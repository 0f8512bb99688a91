package relay

import (
	"context"
	"time"
)

const (
	lookEvery = 500 * time.Millisecond
	lookKeys  = 1000 // at once
)

// blockedKey is a key with a message in outbox_parked.
type blockedKey struct {
	lane int16
	key  string
}

// hold blocks keys that have a message in outbox_parked.
func (h *hand) hold(keys []blockedKey) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, k := range keys {
		l := h.line(k.key, k.lane)
		l.blocked, l.changed = true, true
	}
}

// toLook returns blocked keys of which nothing is in the hand, so that no park of
// them is under way: those that have changed, and if all is true as many others.
// What is blocked in lanes that are no longer ours is forgotten.
func (h *hand) toLook(owned [lanes]int64, all bool) (keys []blockedKey) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for key, l := range h.lines { // in random order: each has its turn
		switch {
		case l.held > 0 || !l.blocked:
		case owned[l.lane] == 0:
			delete(h.lines, key)
		case l.changed || all:
			keys = append(keys, blockedKey{l.lane, key})
			l.changed = false
		}
		if len(keys) == lookKeys {
			break
		}
	}
	return keys
}

// release opens a key that has no message in outbox_parked.
func (h *hand) release(key string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if l := h.lines[key]; l != nil && l.held == 0 {
		delete(h.lines, key)
	}
}

// loadBlocked blocks the keys of lanes that are newly ours, before anything of
// them is published.
func (r *reader) loadBlocked(ctx context.Context) error {
	if len(r.load) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	rows, err := r.db.Query(ctx, r.sql.blocked, unplanned, r.load)
	if err != nil {
		return err
	}
	defer rows.Close()
	var keys []blockedKey
	for rows.Next() {
		var k blockedKey
		if err := rows.Scan(&k.lane, &k.key); err != nil {
			return err
		}
		keys = append(keys, k)
	}
	if err := rows.Err(); err != nil {
		return err
	}
	r.hand.hold(keys)
	r.load = nil
	return nil
}

// readBlocked looks at the heads of blocked keys. What can be sent now is read,
// each key's in order up to the first that cannot; a key that has nothing left in
// outbox_parked is open again. Nothing of these keys is in the hand and only the
// reader brings something, so none can be parked meanwhile.
func (r *reader) readBlocked(ctx context.Context, ids []int16) (added int, err error) {
	all := time.Since(r.lookedAt) >= lookEvery
	keys := r.hand.toLook(r.epochs, all)
	if all {
		r.lookedAt = time.Now()
	}
	if len(keys) == 0 {
		return 0, nil
	}
	// The hand remembers what was settled of them since the last read: it would
	// take the followers of a head that is due again, and not the head.
	r.hand.readEnded()
	laneIDs, names := make([]int16, len(keys)), make([]string, len(keys))
	for i, k := range keys {
		laneIDs[i], names[i] = k.lane, k.key
	}
	p, err := r.read(ctx, r.sql.heads, pageBytes, max(1, pageRows/len(keys)), ids, laneIDs, names)
	if err != nil {
		r.hand.hold(keys)
		return 0, err
	}
	stop := make(map[string]int64) // the first id that is not to be sent yet
	for _, m := range p.rest {
		if at, ok := stop[m.key]; !ok || m.id < at {
			stop[m.key] = m.id
		}
	}
	found := make(map[string]bool)
	var due []*message
	for _, m := range p.messages {
		m.parked = true
		found[m.key] = true
		if at, ok := stop[m.key]; !ok || m.id < at {
			due = append(due, m)
		}
	}
	for _, k := range keys {
		if _, held := stop[k.key]; !held && !found[k.key] && !p.cut {
			r.hand.release(k.key)
		}
	}
	if p.cut {
		r.hand.hold(keys)
	}
	return r.hand.admit(due), nil
}
