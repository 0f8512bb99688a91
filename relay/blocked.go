package relay

import (
	"context"
	"time"
)

const (
	walkEvery  = time.Second
	keysAtOnce = 1000 // looked at in one statement
)

// blockedKey is a key with a message in outbox_parked.
type blockedKey struct {
	lane int16
	key  string
}

// changedKeys returns keys of which what is parked has changed and nothing is in the
// hand, so that no park of them is under way. Of the others it is enough to look
// when they have left the hand.
func (h *hand) changedKeys(more []blockedKey) (keys []blockedKey) {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := min(keysAtOnce, len(h.changed))
	more = append(more, h.changed[:n]...)
	h.changed = h.changed[n:]
	seen := make(map[string]bool, len(more))
	for _, k := range more {
		if l := h.lines[k.key]; (l == nil || l.unsettled == 0) && !seen[k.key] {
			seen[k.key] = true
			keys = append(keys, k)
		}
	}
	return keys
}

func (h *hand) keysChanged(keys []blockedKey) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.changed = append(h.changed, keys...)
}

// walk returns the next keys that have a message in outbox_parked: an operator may
// have taken away what held them.
func (r *reader) walk(ctx context.Context, ours []int16) (keys []blockedKey, err error) {
	if r.noParked || time.Since(r.walkedAt) < walkEvery || !r.walking.due() {
		return nil, nil
	}
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	perLane := max(1, keysAtOnce/len(ours))
	rows, err := r.db.Query(ctx, r.sql.blocked, unplanned, ours, r.walked, perLane)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	to := ""
	for rows.Next() {
		var k blockedKey
		var n int
		if err := rows.Scan(&k.lane, &k.key, &n); err != nil {
			return nil, err
		}
		keys = append(keys, k)
		if n == perLane && (to == "" || k.key < to) {
			to = k.key // the other lanes go on from there too
		}
	}
	r.walked, r.walkedAt = to, time.Now()
	r.walking.ran(began)
	return keys, rows.Err()
}

// readBlocked looks at the heads of blocked keys. What can be sent now is read,
// each key's in order up to the first that cannot. A key all of whose parked
// messages are in the hand is no longer blocked: what follows waits there behind
// them. Nothing of these keys is in the hand and only the reader brings something,
// so none can be parked meanwhile.
func (r *reader) readBlocked(ctx context.Context, ours []int16) (more bool, err error) {
	walked, err := r.walk(ctx, ours)
	if err != nil {
		return false, err
	}
	keys := r.hand.changedKeys(walked)
	if len(keys) == 0 {
		return false, nil
	}
	// The hand remembers what was settled of them since the last read: it would
	// take the followers of a head that is due again, and not the head.
	r.hand.readEnded()
	laneIDs, names := make([]int16, len(keys)), make([]string, len(keys))
	for i, k := range keys {
		laneIDs[i], names[i] = k.lane, k.key
	}
	perKey := max(1, lineRows/len(keys))
	p, err := r.durably(ctx, func(ctx context.Context, db querier) (page, error) {
		return r.read(ctx, db, r.sql.heads, perKey, ours, laneIDs, names)
	})
	if err != nil {
		r.hand.keysChanged(keys)
		return false, err
	}
	stop := make(map[string]int64) // the first id that is not to be sent yet
	for _, m := range p.rest {
		if at, ok := stop[m.key]; !ok || m.id < at {
			stop[m.key] = m.id
		}
	}
	found := make(map[string]int)
	var due []*message
	for _, m := range p.messages {
		found[m.key]++
		if at, ok := stop[m.key]; !ok || m.id < at {
			due = append(due, m)
		}
	}
	for _, m := range due {
		_, held := stop[m.key]
		m.parked, m.behind = true, held || p.cut() || found[m.key] >= perKey
	}
	if p.cut() {
		r.hand.keysChanged(keys)
	}
	return r.hand.admit(due) > 0, nil
}
