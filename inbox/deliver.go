package inbox

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
)

// work handles messages until ctx ends. What is in hand then may use workCtx to
// the end.
func (c *Consumer) work(ctx, workCtx context.Context, own <-chan *delivery) {
	shared := c.queues[c.cfg.Workers]
	for {
		select {
		case <-ctx.Done():
			return
		case d := <-own:
			c.deliver(workCtx, c.gather(d, own, shared))
		case d := <-shared:
			c.deliver(workCtx, c.gather(d, own, shared))
		case id := <-c.due:
			c.handleAgain(ctx, workCtx, id)
		}
	}
}

// gather returns d and what else has been delivered, up to a batch. It does not wait.
func (c *Consumer) gather(d *delivery, queues ...<-chan *delivery) []*delivery {
	all := []*delivery{d}
	limit := c.batch.get()
	for _, queue := range queues {
		for more := true; more && len(all) < limit; {
			select {
			case d := <-queue:
				all = append(all, d)
			default:
				more = false
			}
		}
	}
	return all
}

// deliver sees to it that deliveries are recorded with their effects, or parked, and
// acknowledges them after that.
func (c *Consumer) deliver(ctx context.Context, deliveries []*delivery) {
	deliveries = slices.DeleteFunc(deliveries, func(d *delivery) bool { return d.live.Err() != nil })
	if len(deliveries) == 0 {
		return
	}
	r := &round{Consumer: c, ctx: ctx, live: deliveries[0].live, alone: len(deliveries) == 1}
	var items []*item // to be handled in one transaction
	byID := make(map[string]*item, len(deliveries))
	flush := func() { r.settle(items); items = nil; clear(byID) }
	for _, d := range deliveries {
		if r.live.Err() != nil {
			return
		}
		m := &item{envelope: newEnvelope(&d.Delivery), attempt: 1, deliveries: []*delivery{d}}
		twin := byID[m.id()]
		switch {
		case c.setAside(m):
		case twin != nil && twin.digest() == m.digest():
			twin.deliveries = append(twin.deliveries, d)
		case twin != nil:
			flush()
			items, byID[m.id()] = append(items, m), m
		case mayKill(d):
			flush()
			if r.live.Err() == nil && !r.isLate(m) {
				r.parkKiller(m)
			}
		case c.prepareDelivered(ctx, r.live, m):
			items, byID[m.id()] = append(items, m), m
		}
	}
	flush()
	for _, m := range r.late {
		switch {
		case r.live.Err() != nil:
			return
		case mayKill(m.deliveries[0]):
			r.parkKiller(m)
		default:
			r.settleOne(m)
		}
	}
}

// round is what a worker does with deliveries that it took at once.
type round struct {
	*Consumer
	ctx, live context.Context
	alone     bool    // there is one delivery: nothing else waits while it does
	late      []*item // what others hold comes after all else, with what follows it in its key
}

// setAside parks a message that is not to be handled, whatever is recorded of it, and
// reports whether it is one.
func (c *Consumer) setAside(m *item) bool {
	if err := checkName("message_id", m.id(), maxMessageID); err != nil {
		reason := reasonBadID
		if m.id() == "" {
			reason = reasonMissingID
		}
		c.parkUnowned(m, reason, err)
		return true
	}
	if at := m.createdAt(); !at.IsZero() && time.Since(at) > c.cfg.Horizon {
		c.parkUnowned(m, reasonTooOld, fmt.Errorf("written at %s: what came so long ago may be forgotten, so nobody knows whether this is a duplicate", at.Format(time.RFC3339)))
		return true
	}
	return false
}

// carefulAfter is how many deliveries a quorum queue counts before a message is handled
// as one that may have killed the process each time.
const carefulAfter = 3

var errMayKill = errors.New("it was delivered and came back: its attempts are counted before they are made, in case it kills the process")

// parkKiller parks a message that may have killed the process.
func (r *round) parkKiller(m *item) {
	r.park(r.live, m, false, parking{reason: reasonRetry, err: errMayKill})
}

// mayKill reports whether a delivery was in hand of a process that died, perhaps because
// of it. A quorum queue counts, a classic one only tells that it is not the first.
func mayKill(d *delivery) bool {
	switch count := d.Headers["x-delivery-count"].(type) {
	case int64:
		return count >= carefulAfter
	case int32:
		return count >= carefulAfter
	}
	return d.Redelivered
}

// settle sees to it that messages are on record, as applied or parked, and acknowledges
// them: all in one transaction, or, when a handler fails, those before it, it alone, and
// those after it; by halves if nobody knows whose fault it is.
func (r *round) settle(items []*item) {
	items = slices.DeleteFunc(items, r.isLate)
	if len(items) == 0 || r.live.Err() != nil { // nothing of a key may follow what was not settled
		return
	}
	result := r.apply(r.ctx, r.live, unit{items: items, patient: r.alone})
	at := result.culprit
	switch {
	case result.verdict == applied:
		r.batch.grow(len(items))
		r.recorded(r.ctx, r.live, items, result.unknown)
	case result.verdict == stopped:
	case result.verdict == contested:
		r.batch.shrink(len(items))
		for _, m := range items {
			m.contested = true
		}
		if len(items) == 1 {
			r.late = append(r.late, items[0])
		} else {
			r.settleHalves(items)
		}
	case len(items) == 1:
		r.failed(r.live, items[0], result.verdict == ended, result.err)
	case result.verdict == ended:
		// What it committed may say that those after it were handled.
		if !r.forget(r.ctx, items[at+1:], result.xid) {
			return
		}
		r.settle(items[:at])
		if at == 0 || r.live.Err() == nil {
			r.failed(r.live, items[at], true, result.err)
			r.settle(items[at+1:])
		}
	case at >= 0:
		r.settle(items[:at])
		r.settle(items[at : at+1])
		r.settle(items[at+1:])
	default:
		r.settleHalves(items)
	}
}

// settleHalves waits for a moment, so that whoever was in the way can go on.
func (r *round) settleHalves(items []*item) {
	_ = sleep(r.live, rand.N(10*time.Millisecond))
	half := len(items) / 2
	r.settle(items[:half])
	r.settle(items[half:])
}

// isLate reports whether a message has to wait for another of its key, and puts it there.
func (r *round) isLate(m *item) bool {
	late := m.key() != "" && slices.ContainsFunc(r.late, func(other *item) bool { return other.key() == m.key() })
	if late {
		r.late = append(r.late, m)
	}
	return late
}

// settleOne settles a message however long others hold what it needs.
func (r *round) settleOne(m *item) {
	result := r.apply(r.ctx, r.live, unit{items: []*item{m}, patient: true})
	switch result.verdict {
	case applied:
		r.recorded(r.ctx, r.live, []*item{m}, result.unknown)
	case failed, ended:
		r.failed(r.live, m, result.verdict == ended, result.err)
	}
}

// forget deletes the records of messages that a transaction made whose handler then ended
// it, before theirs ran. The transaction's own, that is: others may have recorded them
// since, with their effects.
func (c *Consumer) forget(ctx context.Context, items []*item, xid uint32) bool {
	var ids []string
	for _, m := range items {
		if m.fate == handled { // what is blocked is parked, too
			ids = append(ids, m.id())
		}
	}
	_, ok := c.persist(ctx, statement{forgetSQL(c.cfg.Schema), []any{c.cfg.Name, ids, int64(xid)}})
	return ok
}

// recorded counts and acknowledges messages that are on record. What was recorded before
// is a duplicate, unless it has the ID of another message.
func (c *Consumer) recorded(ctx, live context.Context, items []*item, unknown bool) {
	var before []*item
	for _, m := range items {
		if m.fate == taken {
			before = append(before, m)
		}
	}
	others, ok := c.othersWithID(live, before)
	if !ok {
		return // RabbitMQ delivers them all again
	}
	var settled []*item
	duplicates, effects, behind := 0, 0, 0
	for _, m := range items {
		duplicates += len(m.deliveries) - 1
		switch {
		case m.fate == taken && others[m.id()]:
			c.parkUnowned(m, reasonConflict, errConflict)
			continue
		case m.fate == taken && !unknown:
			duplicates++
		case m.fate == blocked:
			behind++
		default:
			effects++
		}
		settled = append(settled, m)
	}
	c.count(func(s *Stats) {
		s.Applied += uint64(effects)
		s.Duplicates += uint64(duplicates)
		s.Parked[reasonBlocked] += uint64(behind)
	})
	acknowledge(settled...)
	for _, m := range items {
		if m.fate == blocked { // behind what may be gone by now
			c.unblock(ctx, m.envelope)
		}
	}
}

var errConflict = errors.New("another message with this ID was received before")

// othersWithID returns the IDs among those recorded under which another message was
// received; false if live ended before that was known.
func (c *Consumer) othersWithID(live context.Context, items []*item) (others map[string]bool, ok bool) {
	others = make(map[string]bool)
	if len(items) == 0 {
		return others, true
	}
	ids, digests := make([]string, len(items)), make(map[string]int64, len(items))
	for i, m := range items {
		ids[i], digests[m.id()] = m.id(), m.digest()
	}
	ok = c.persevere(live, func(ctx context.Context) error {
		rows, err := c.db.Query(ctx, digestsSQL(c.cfg.Schema), c.cfg.Name, ids)
		if err != nil {
			return err
		}
		var id string
		var digest int64
		_, err = pgx.ForEachRow(rows, []any{&id, &digest}, func() error {
			others[id] = digests[id] != digest
			return nil
		})
		return err
	})
	return others, ok
}
