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
	messages []*message // to be published
	rest     []*message // others, without their payload
	ids      []int64    // of any lane, sorted
	cut      bool       // there may be more behind the last id
	durable  bool       // the log was on disk up to position
	position string     // in the log, after every commit that the read could see
	running  snapshot
	drawn    int64 // the last id of the sequence
	free     bool  // there are lanes that nobody owns
}

// unplanned makes PostgreSQL plan a statement for each execution, by the size
// that the table has then: a plan that was made and kept while the table was
// empty reads all of it once it is not (0.2 s of 300,000 rows instead of 2 ms). It
// leaves no named statement in the session, which a pooler would hand to others.
const unplanned = pgx.QueryExecModeCacheDescribe

// readSpans reads the ids in spans, of which only the last may be open; of keys alone,
// if there are any.
func (r *reader) readSpans(ctx context.Context, spans []span, ours []int16, keys ...string) (p page, err error) {
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
		p, err = r.read(ctx, r.sql.page, rows, ours, from, keys, most, eachKey)
	} else {
		lows, highs := make([]int64, len(spans)), make([]int64, len(spans))
		for i, s := range spans {
			lows[i], highs[i] = s.low, s.high
		}
		p, err = r.read(ctx, r.sql.pages, rows, ours, from, keys, most, eachKey, lows, highs)
	}
	if time.Since(asked) > slowLook {
		r.anyKey.ran(asked)
	}
	p.cut = p.cut || len(p.ids) >= rows || len(p.ids)-len(p.rest) >= most
	return p, err
}

// read returns a page whose rows are on disk, of lanes that are still ours under
// the same epoch. Rows are visible before they are durable if their producer uses
// synchronous_commit=off: a server that crashes then has never heard of them.
func (r *reader) read(ctx context.Context, sql string, rows int, ours []int16, args ...any) (p page, err error) {
	ctx, cancel := context.WithTimeout(ctx, r.limit())
	defer cancel()
	args = append([]any{unplanned, pageBytes, rows, laneSet(ours)}, args...)
	quick := !r.loaded && sql == r.sql.page
	if quick {
		p, err = query(ctx, r.db, sql, args)
	}
	if !quick || err == nil && !p.durable && len(p.ids) > 0 {
		p, err = r.readDurably(ctx, sql, args)
	}
	if err != nil {
		return page{}, err
	}
	if p.free {
		notify(r.leases.look)
	}
	size, now, mine := 0, r.leases.owned(), p.messages[:0]
	for _, m := range p.messages {
		size += len(m.payload)
		if m.epoch = r.epochs[m.lane]; m.epoch == now[m.lane] {
			mine = append(mine, m)
		}
	}
	p.messages, p.cut = mine, size >= pageBytes
	return p, nil
}

// readDurably reads a page in a transaction and ends it when the log is on disk up
// to a position after every commit that the page can show. The transaction ties
// page and position to one server process: if that crashes, the page is lost with
// it. It costs one commit if nobody else's flushes the log in time.
func (r *reader) readDurably(ctx context.Context, sql string, args []any) (page, error) {
	tx, err := r.db.BeginTx(ctx, pgx.TxOptions{BeginQuery: beginSQL})
	if err != nil {
		return page{}, err
	}
	defer tx.Rollback(context.WithoutCancel(ctx))
	p, err := query(ctx, tx, sql, args)
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
	for rows.Next() {
		if rows.RawValues()[0] == nil { // the head
			var age int32 // of the first transaction number, 3: how many came after it
			if err := rows.Scan(nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil,
				&p.durable, &p.position, &p.running.listed, &p.running.xmax, &age, &p.drawn, &p.free); err != nil {
				return page{}, err
			}
			p.running.next = p.running.xmax + uint64(uint32(age)+3-uint32(p.running.xmax))
			continue
		}
		m := &message{}
		var mine bool
		if err := rows.Scan(&m.id, &m.lane, (*[16]byte)(&m.messageID), &m.key, &m.exchange, &m.routingKey, &m.typ, &m.contentType,
			(*headerText)(&m.headers), &m.payload, &m.createdAt, &m.attempts, &mine, &m.behind, nil, nil, nil, nil, nil, nil, nil); err != nil {
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
	slices.Sort(p.ids)
	slices.SortFunc(p.messages, func(a, b *message) int { return cmp.Compare(a.id, b.id) })
	return p, nil
}

// laneSet has a bit for each lane.
func laneSet(ours []int16) (set int64) {
	for _, id := range ours {
		set |= 1 << id
	}
	return set
}
