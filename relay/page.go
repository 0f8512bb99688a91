package relay

import (
	"cmp"
	"context"
	"math"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
)

// page is what one read has found.
type page struct {
	messages []*message // to be published, sorted
	rest     []*message // others, without their payload
	ids      []int64    // of any lane, sorted
	upTo     int64      // nothing of what was asked for is missing up to this id
	durable  bool       // the log was on disk up to position
	position string     // in the log, after every commit that the read could see
	running  snapshot
	drawn    int64 // the last id of the sequence
	free     bool  // there are lanes that nobody owns
}

// all is the upTo of a page that is complete.
const all = math.MaxInt64

func (p *page) cut() bool { return p.upTo != all }

// unplanned makes PostgreSQL plan a statement for each execution, by the size
// that the table has then: a plan that was made and kept while the table was
// empty reads all of it once it is not (0.2 s of 300,000 rows instead of 2 ms). It
// leaves no named statement in the session, which a pooler would hand to others.
const unplanned = pgx.QueryExecModeCacheDescribe

// readSpans reads the ids in spans, of which only the last may be open; of keys alone,
// if there are any.
func (r *reader) readSpans(ctx context.Context, db querier, spans []span, ours []int16, keys ...string) (p page, err error) {
	rows, most := pageRows, pageRows // to be read, and to be published
	if len(keys) > 0 {
		most = min(most, lineRows*len(keys))
		rows = min(rows, 2*most) // what is passed over is mostly of a few keys
	}
	from := int64(math.MaxInt64) // above all ids
	if last := len(spans) - 1; last >= 0 && spans[last].high == math.MaxInt64 {
		from, spans = spans[last].low, spans[:last]
	}
	asked, eachKey := time.Now(), !r.anyKey.due()
	if len(spans) == 0 {
		p, err = r.read(ctx, db, r.sql.page, rows, ours, from, keys, most, eachKey)
	} else {
		lows, highs := make([]int64, len(spans)), make([]int64, len(spans))
		for i, s := range spans {
			lows[i], highs[i] = s.low, s.high
		}
		p, err = r.read(ctx, db, r.sql.pages, rows, ours, from, keys, most, eachKey, lows, highs)
	}
	if time.Since(asked) > slowLook {
		r.anyKey.ran(asked)
	}
	if len(p.ids) >= rows || len(p.ids)-len(p.rest) >= most {
		p.upTo = p.ids[len(p.ids)-1]
	}
	return p, err
}

// read returns a page of lanes that are still ours under the same epoch.
func (r *reader) read(ctx context.Context, db querier, sql string, rows int, ours []int16, args ...any) (page, error) {
	p, err := query(ctx, db, sql, append([]any{unplanned, pageBytes, rows, laneSet(ours)}, args...))
	if err != nil {
		return page{}, err
	}
	if p.free {
		notify(r.leases.wake)
	}
	size, now, mine := 0, r.leases.owned(), p.messages[:0]
	for _, m := range p.messages {
		size += len(m.payload)
		if m.epoch = r.epochs[m.lane]; m.epoch == now[m.lane] {
			mine = append(mine, m)
		}
	}
	if p.messages = mine; size >= pageBytes {
		p.upTo = p.ids[len(p.ids)-1]
	}
	return p, nil
}

// durably runs reads in one snapshot and ends it when the log is on disk up to a
// position after every commit that they can show. Rows are visible before they are
// durable if their producer uses synchronous_commit=off: a server that crashes then has
// never heard of them. The transaction ties page and position to one server process: if
// that crashes, the page is lost with it. It costs one commit if nobody else's flushes
// the log in time.
func (r *reader) durably(ctx context.Context, reads func(context.Context, querier) (page, error)) (page, error) {
	ctx, cancel := context.WithTimeout(ctx, r.limit())
	defer cancel()
	tx, err := r.db.BeginTx(ctx, pgx.TxOptions{BeginQuery: beginSQL})
	if err != nil {
		return page{}, err
	}
	defer tx.Rollback(context.WithoutCancel(ctx))
	p, err := reads(ctx, tx)
	if err != nil {
		return page{}, err
	}
	flushed := p.durable || len(p.ids) == 0
	for limit := time.Now().Add(flushWait); !flushed && time.Now().Before(limit); {
		if err := pause(ctx, time.Millisecond); err != nil {
			return page{}, err
		}
		if err := tx.QueryRow(ctx, r.sql.flushed, unplanned, p.position).Scan(&flushed); err != nil {
			return page{}, err
		}
	}
	if !flushed {
		if _, err := tx.Exec(ctx, emitSQL, unplanned); err != nil {
			return page{}, err
		}
	}
	return p, tx.Commit(ctx)
}

type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

func query(ctx context.Context, db querier, sql string, args []any) (p page, err error) {
	rows, err := db.Query(ctx, sql, args...)
	if err != nil {
		return page{}, err
	}
	defer rows.Close()
	p.upTo = all
	for rows.Next() {
		if rows.RawValues()[0] == nil { // the head
			var age int32 // of the first transaction number, 3: how many came after it
			if err := rows.Scan(nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil,
				&p.durable, &p.position, &p.running.listed, &p.running.xmax, &age, &p.drawn, &p.free); err != nil {
				return page{}, err
			}
			p.running.next = p.running.xmax + uint64(uint32(age)+3-uint32(p.running.xmax))
			continue
		}
		m := &message{}
		var mine bool
		if err := rows.Scan(&m.id, &m.lane, (*[16]byte)(&m.messageID), &m.key, &m.exchange, &m.routingKey, &m.typ, &m.contentType,
			(*headerText)(&m.headers), &m.payload, &m.createdAt, &m.attempts, &m.parkedFor, &mine, &m.behind, nil, nil, nil, nil, nil, nil, nil); err != nil {
			return page{}, err
		}
		p.ids = append(p.ids, m.id)
		if mine {
			p.messages = append(p.messages, m)
		} else {
			p.rest = append(p.rest, m)
		}
	}
	if err := rows.Err(); err != nil {
		return page{}, err
	}
	p.sort()
	return p, nil
}

func (p *page) sort() {
	slices.Sort(p.ids)
	slices.SortFunc(p.messages, func(a, b *message) int { return cmp.Compare(a.id, b.id) })
}

// cutAt takes away what is above an id.
func (p *page) cutAt(id int64) {
	p.upTo = id
	n, _ := slices.BinarySearch(p.ids, id+1)
	p.ids = p.ids[:n]
	n, _ = slices.BinarySearchFunc(p.messages, id+1, func(m *message, id int64) int { return cmp.Compare(m.id, id) })
	p.messages = p.messages[:n]
}

// laneSet has a bit for each lane.
func laneSet(ours []int16) (set int64) {
	for _, id := range ours {
		set |= 1 << id
	}
	return set
}
